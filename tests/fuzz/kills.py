"""Kill a training and an evaluation wherever they touch a file, resume, and compare.

A child process runs the work and ends with `os._exit` at one point: before, within or after a
write, before or after a rename or a flush to disk, and after a training step. As after a real kill,
no `finally` runs and no buffer is written. Then the work is resumed, in another child, and must end
as the uninterrupted work does: training with the same bits, evaluation with the same verdicts.

`python -m tests.fuzz.kills --all` tries every point, and resumes that are killed again; without
`--all` it tries a few points. `--seed` chooses where the resumes are killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by optimisers; here, so that no child needs the time

from pyadv import training
from pyadv.attacks import PGD
from pyadv.data import ImageData, load
from pyadv.evaluation import evaluate
from pyadv.models import SmallCNN
from pyadv.training import Config, Display, checkpoint, plots

KILLED, FAILED = 137, 1


@dataclasses.dataclass(frozen=True)
class Job:
    """Work that writes to a folder.

    Args:
        name: of the job.
        work: begins the work in a folder, or resumes what it finds there.
        outcome: what the finished work left in a folder, as plain values and tensors.
    """

    name: str
    work: Callable[[Path], Any]
    outcome: Callable[[Path], Any]


# -- the injector ---------------------------------------------------------------------------------


class Injector:
    """Counts the points that the work passes, and ends the process at point number `kill`."""

    def __init__(self, kill: int | None) -> None:
        self.kill, self.labels = kill, []

    def point(self, label: str) -> None:
        """Pass a point."""
        if len(self.labels) == self.kill:
            os._exit(KILLED)
        self.labels.append(label)

    def install(self) -> None:
        """Put points around everything that writes; the process keeps them until its end."""
        for name in ("fsync", "replace", "rename", "unlink"):
            setattr(os, name, self._around(getattr(os, name), f"os.{name}"))
        Path.write_text = lambda path, text, **more: self._write_text(path, text, **more)
        torch.optim.SGD.step = self._around(torch.optim.SGD.step, "step")
        save = torch.save

        def save_in_two_parts(state: Any, file: Any, *args: Any, **more: Any) -> None:
            whole = io.BytesIO()
            save(state, whole, *args, **more)
            data = whole.getvalue()
            self.point("torch.save: before")
            file.write(data[: len(data) // 2])
            file.flush()
            self.point("torch.save: half")
            file.write(data[len(data) // 2 :])
            self.point("torch.save: after")

        torch.save = save_in_two_parts

    def _around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def around(*args: Any, **more: Any) -> Any:
            self.point(f"{label}: before")
            result = function(*args, **more)
            self.point(f"{label}: after")
            return result

        return around

    def _write_text(self, path: Path, text: str, encoding: str | None = None) -> None:
        self.point("write_text: before")
        with open(path, "w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
            file.flush()
            self.point("write_text: half")
            file.write(text[len(text) // 2 :])
        self.point("write_text: after")


def run(job: Job, folder: Path, kill: int | None) -> list[str] | None:
    """Run `job` in a child process that ends at point `kill`.

    Return the labels of the points that it passed if it came to its end, None if it was killed.
    Raise AssertionError with the child's traceback if it failed.
    """
    report = folder.with_name(folder.name + ".report")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = FAILED
        try:
            injector = Injector(kill)
            injector.install()
            job.work(folder)
            text, code = json.dumps(injector.labels), 0
        except BaseException:
            text = traceback.format_exc()
        with open(report, "w") as file:
            file.write(text)
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == KILLED:
        return None
    text = report.read_text()
    report.unlink()
    assert code == 0, f"{job.name}, killed at {kill}: {text}"
    return json.loads(text)


# -- the jobs -------------------------------------------------------------------------------------


def training_job() -> Job:
    """Return a training of three epochs of three batches, with held-out images."""
    data, quiet = first_images(56, 12), Display(quiet=True)
    config = Config(epochs=3, batch_size=16, steps=1, lr=0.05, val=8, augment=True, log_with="none")
    settings = {"data": data, "device": "cpu", "display": quiet}

    def work(folder: Path) -> None:
        # Pictures are not compared and take most of the time, as trackers would.
        plots.curves = plots.kappa = lambda *_: None
        if (folder / "checkpoint.pt").exists():
            training.resume(folder, **settings)
        else:
            training.train(config, folder, **settings)

    def outcome(folder: Path) -> Any:
        left = {file.name for file in folder.iterdir()}
        assert not [name for name in left if "partial" in name or "lock" in name], left
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        states = [checkpoint.load(folder / name) for name in ("checkpoint.pt", "best.pt")]
        jsons = [
            json.loads((folder / f"{name}.json").read_text()) for name in ("results", "config")
        ]
        return states, [json.loads(line) for line in lines], jsons

    return Job("training", work, outcome)


def evaluation_job() -> Job:
    """Return an evaluation under two attacks that saves its state after each batch."""
    data = first_images(0, 24)

    def work(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        ticks = iter(range(0, 10**9, 3600))
        time.monotonic = lambda: float(next(ticks))  # so that it is always time to save
        torch.manual_seed(0)
        model = SmallCNN()
        attack = {"norm": "Linf", "eps": 0.02, "steps": 3, "seed": 0}
        # Labels that the network, which is not trained, predicts: else nothing could be attacked.
        y = model(data.test_x).argmax(1)
        y[::4] = (y[::4] + 1) % 10
        report = evaluate(
            model,
            data.test_x,
            y,
            eps=0.02,
            attacks={"ce": PGD(**attack), "margin": PGD(loss="margin", **attack)},
            batch_size=8,
            state=folder / "state.pt",
            progress=None,
        )
        report.save(folder / "report.json")
        verdicts = {row.name: row.correct.tolist() for row in (*report.rows, report.worst)}
        (folder / "verdicts.json").write_text(json.dumps(verdicts))

    def outcome(folder: Path) -> Any:
        left = {file.name for file in folder.iterdir()}
        assert not [name for name in left if "partial" in name], left
        names = "report.json", "verdicts.json"
        return [json.loads((folder / name).read_text()) for name in names]

    return Job("evaluation", work, outcome)


def first_images(train: int, test: int) -> ImageData:
    """Return the embedded data set cut to its first images, at least one for training."""
    full, train = load(), max(train, 1)
    return dataclasses.replace(
        full,
        train_x=full.train_x[:train],
        train_y=full.train_y[:train],
        test_x=full.test_x[:test],
        test_y=full.test_y[:test],
    )


JOBS = {"training": training_job, "evaluation": evaluation_job}


# -- the search -----------------------------------------------------------------------------------


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested values differ, apart from times and dates."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - {"seconds", "provenance"}
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (p, q) in pairs for d in differences(p, q, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [f"{path}: {a} and {b}"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread: a forked child has no other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def search(
    job: Job, folder: Path, choose: Callable[[list[str]], list[int]], again: random.Random | None
) -> int:
    """Kill `job` at the points that `choose` picks of the labels of all points, and compare.

    With `again`, each resume is killed too, at a random point. Return the number of kills; raise
    AssertionError at the first difference.
    """
    with one_thread():
        labels = run(job, folder / "whole", None)
        whole, kills = job.outcome(folder / "whole"), 0
        for kill in choose(labels):
            place = folder / f"kill{kill}"
            where = f"{job.name} killed at point {kill} ({labels[kill]})"
            assert run(job, place, kill) is None, f"{where} came to its end"
            kills += 1
            if again is not None:
                second = again.randrange(len(labels))
                where += f", resumed and killed at point {second}"
                kills += run(job, place, second) is None  # fewer points may be left
            run(job, place, None)
            found = differences(whole, job.outcome(place))
            assert not found, f"{where}: after resuming {found[:5]} differ"
    return kills


def every(stride: int) -> Callable[[list[str]], list[int]]:
    """Return a choice of every `stride`-th point."""
    return lambda labels: list(range(0, len(labels), stride))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every point, and kills of the resumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=" or ".join(JOBS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    total, begin = 0, time.perf_counter()
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"no such job: {', '.join(sorted(unknown))}")
    for name in options.jobs or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            again = random.Random(options.seed) if options.all else None
            kills = search(JOBS[name](), Path(folder), every(1 if options.all else 10), again)
        total += kills
        print(f"{name}: {kills} kills, no difference", flush=True)
    print(f"{total} kills in {time.perf_counter() - begin:.0f} s, nothing lost")


if __name__ == "__main__":
    main()
