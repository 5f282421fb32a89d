"""All that is to be done on a card, by one command.

    python benchmarks/gpu_suite.py --out DIR [--only STAGE ...] [--minutes N] [--data FILE]
                                   [--runs DIR] [--again] [--dry]

The stages, in the order in which the first minutes give the most:

    build      compile the kernels for the card that is there
    tests      all tests marked `cuda`: ops, attacks, graphs, compaction
    kernels    bytes, time and share of the copy's bandwidth of each kernel
    attacks    PGD on ResNet-18 and WRN-34-10 against eager loops and the recorded floor
    training   training steps against the authors' form
    sanitizer  compute-sanitizer's four tools over every kernel, at small odd sizes
    counters   Nsight Compute on each kernel: bandwidth, registers, occupancy
    record     ResNet-18 to robustness as fast as it goes; what the fast settings of attacks miss
    at gairat at-emr fat trades mail-at trades-emr
               the methods at one budget: accuracies under PGD-20, margin PGD and AutoAttack

Each stage is a process with a time limit, so that none takes the others along; what it finds is in
DIR at once. A stage that is done is not done again, training goes on from its last checkpoint in
RUNS, and `--only` takes a slice. `--minutes` bounds the whole. DIR/status.json says how each stage
ended, DIR/log.txt what it printed, DIR/summary.md is the result.

Training wants `--data`: what `pyadv.data.load` reads, or an .npz.xz of JPEG files (arrays `jpeg`,
the bytes of all files, `lengths`, `labels` and `n_train`), which needs Pillow. `--dry` runs every
stage on the CPU at tiny sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

ROOT = harness.HERE.parent
METHODS: dict[str, dict[str, Any]] = {
    "at": {"method": "at"},
    "gairat": {"method": "gairat"},
    "at-emr": {"method": "at", "emr": 3 / 128},
    "fat": {"method": "fat"},
    "trades": {"method": "trades"},
    "mail-at": {"method": "mail-at"},
    "trades-emr": {"method": "trades", "emr": 3 / 128},
}
_GRACE = 60  # seconds in which an interrupted training run saves itself


@dataclass(frozen=True)
class Stage:
    """`commands(suite)` are run one after the other; `minutes` is their limit on a card."""

    minutes: float
    commands: Callable[[Suite], list[list[str]]]


class Suite:
    """One folder of results."""

    def __init__(self, given: argparse.Namespace):
        self.out, self.runs, self.data, self.dry = given.out, given.runs, given.data, given.dry
        self.device = "cpu" if given.dry else "cuda"
        self.status_file = self.out / "status.json"

    @property
    def status(self) -> dict[str, dict[str, Any]]:
        there = self.status_file.exists()
        return json.loads(self.status_file.read_text()) if there else {}

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, *arguments]

    def ask(self, question: str, *more: str, quick: bool = False) -> list[str]:
        """The driver of the benchmarks on one question."""
        size = ["--quick"] if quick or self.dry else []
        where = ["--device", self.device, "--threads", "1", "--out", str(self.out)]
        return self.python(
            str(harness.HERE / "run.py"), question, "--against", "none", *where, *size, *more
        )

    def within(self, part: str) -> list[str]:
        """One of the functions below, in a process of its own."""
        more = ["--data", str(self.data)] if self.data else []
        dry = ["--dry"] if self.dry else []
        files = ["--out", str(self.out), "--runs", str(self.runs)]
        return self.python(str(Path(__file__)), "--within", part, *files, *more, *dry)

    def run(self, name: str, seconds: float) -> str:
        """done, failed or stopped."""
        begin, result = time.monotonic(), "done"
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {name}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            log.flush()
            for command in STAGES[name].commands(self):
                left = seconds - (time.monotonic() - begin)
                log.write(f"$ {' '.join(command)}\n")
                log.flush()
                code = call(command, log, left)
                log.write("stopped\n" if code is None else f"exit status {code}\n")
                if code != 0:
                    result = "stopped" if code is None else "failed"
                if code is None:
                    break
        took = round(time.monotonic() - begin, 1)
        write(self.status_file, {**self.status, name: {"state": result, "seconds": took}})
        return result


def call(command: list[str], log: Any, seconds: float) -> int | None:
    """The exit status; None if the time was up. A child that is interrupted first may save."""
    environment = {**os.environ, "PYADV_CUDA": "auto", "PYTHONUNBUFFERED": "1"}
    with contextlib.suppress(OSError):
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            return child.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)
            child.kill()
            child.wait()
            return None
    log.write(f"cannot run {command[0]}\n")
    return 127


def _tests(suite: Suite) -> list[list[str]]:
    which = ["tests/ops/test_geometry.py"] if suite.dry else ["tests", "-m", "cuda and not slow"]
    side_by_side = importlib.util.find_spec("xdist") and not suite.dry
    return [
        suite.python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *which)
        + (["-n", "4"] if side_by_side else [])
    ]


_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def _sanitizer(suite: Suite) -> list[list[str]]:
    body = suite.within("every_kernel")
    if suite.dry or not shutil.which("compute-sanitizer"):
        return [body]
    # PyTorch's allocator would hide where a tensor ends. Who wrote what is to be known of all
    # kernels, the rest of ours alone.
    start = [
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "compute-sanitizer",
        "--error-exitcode",
        "9",
    ]
    ours = ["--kernel-name", "kns=pyadv"]
    return [
        [*start, "--tool", tool, *([] if tool == "initcheck" else ours), *body] for tool in _TOOLS
    ]


_COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def _counters(suite: Suite) -> list[list[str]]:
    body = suite.within("large_kernels")
    if suite.dry or not shutil.which("ncu"):
        return [body]
    which = ["--kernel-name-base", "demangled", "-k", "regex:pyadv", "--clock-control", "none"]
    what = ["--metrics", ",".join(_COUNTERS), "--csv", "--log-file", str(suite.out / "ncu.csv")]
    return [["ncu", *which, *what, *body]]


STAGES = {
    "build": Stage(6, lambda s: [s.within("build")]),
    "tests": Stage(6, _tests),
    "kernels": Stage(4, lambda s: [s.ask("gpu_kernels")]),
    "attacks": Stage(8, lambda s: [s.ask("gpu_attacks")]),
    "training": Stage(3, lambda s: [s.ask("training")]),
    "sanitizer": Stage(5, _sanitizer),
    "counters": Stage(3, _counters),
    "record": Stage(9, lambda s: [s.within("record")]),
    **{name: Stage(9, lambda s, name=name: [s.within(name)]) for name in METHODS},
}


# What runs within a stage's process.


def build(suite: Suite) -> None:
    import pyadv
    from pyadv import _native

    status = pyadv.build()
    print(_native.report())
    if not suite.dry and status.cuda.path is None:
        sys.exit(f"no CUDA kernels: {status.cuda.reason}")


def every_kernel(suite: Suite) -> None:
    """Once, at small odd sizes, against the reference: for the sanitizer."""
    _kernels(suite, quick=True)


def large_kernels(suite: Suite) -> None:
    """Once, at the sizes of the table: for the counters."""
    _kernels(suite, quick=suite.dry)


def _kernels(suite: Suite, quick: bool) -> None:
    import gpu_kernels
    import torch

    wrong, device = [], torch.device(suite.device)

    def check(name: str, result: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
        loose = 1e-4 if dtype == torch.float32 else 2e-2
        difference = harness.close(expected, loose, loose / 10)(result)
        print(name, difference or "")
        if difference:
            wrong.append(name)

    for kernel in gpu_kernels.kernels(quick):
        ours, theirs = gpu_kernels.calls(kernel, device)
        check(kernel.name, ours(), theirs(), kernel.dtype)
    for name, call, expected, _ in gpu_kernels.norm_calls(device, quick):
        check(name, call(), expected)
    if suite.device == "cuda":
        torch.cuda.synchronize()
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


def record(suite: Suite) -> None:
    """The time of every part, and the attack's strength at every speed on the network that comes
    out, over all test images."""
    import torch

    from pyadv.attacks import PGD
    from pyadv.training import load_model

    trainer, data, found = _trained(suite, "record", {"method": "at", "ema": 0.995, "lr": 0.2})
    model = load_model(trainer.folder).model.to(suite.device)
    eps, correct = found["eps"], {}
    for speed in ("exact", "fast", "bfloat16"):
        attack = PGD(model, eps=eps, alpha=eps / 4, steps=10, seed=0, speed=speed)
        pairs = zip(data.test_x.split(500), data.test_y.split(500), strict=True)
        parts = [
            attack.run(x.to(suite.device), y.to(suite.device), draw=0).correct for x, y in pairs
        ]
        correct[speed] = torch.cat(parts)
    found["PGD-10"] = {k: v.double().mean().item() for k, v in correct.items()}
    found["otherwise"] = {k: int((v != correct["exact"]).sum()) for k, v in correct.items()}
    write(suite.out / "record.json", found)
    found["profile"] = _profile(trainer)  # last, because it trains on
    write(suite.out / "record.json", found)


def _profile(trainer: Any, steps: int = 5) -> dict[str, Any]:
    """Where the time of a training step goes: the kernels of the card, or what the CPU does."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = trainer.accelerator.device.type == "cuda"
    trainer.epoch, batches = 1, itertools.cycle(trainer.batches.epoch(1))
    for _ in range(3):  # the attack of a trainer that was only restored is not recorded yet
        trainer._train_step(*next(batches))
    activity, kind = (ProfilerActivity.CPU, "cpu")
    if on_gpu:
        activity, kind = (ProfilerActivity.CUDA, "device")
        torch.cuda.synchronize()
    with profile(activities=[activity]) as seen:
        begin = time.perf_counter()
        for _ in range(steps):
            trainer._train_step(*next(batches))
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    times = {e.key: getattr(e, f"self_{kind}_time_total") / 1e6 for e in seen.key_averages()}
    most = sorted(times, key=times.get, reverse=True)[:12]
    return {
        "seconds of a step": seconds / steps,
        "busy": sum(times.values()) / seconds,
        "shares": {key: times[key] / sum(times.values()) for key in most},
    }


def _trained(suite: Suite, name: str, settings: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer at its end, the data, and what was measured; goes on from a checkpoint, and
    writes what is known before AutoAttack, which takes longest."""
    import torch

    from pyadv.attacks import AutoAttack
    from pyadv.evaluation import effective_margin, evaluate
    from pyadv.training import Config, Display, Trainer, checkpoint, load_model

    begin = time.perf_counter()
    data = _data(suite)
    spent = {"data": time.perf_counter() - begin}
    tiny = {"epochs": 1, "steps": 2, "model": "small-cnn", "batch_size": 16}
    full = {"epochs": 15, "model": "resnet-18"}
    common = {"precision": "bf16", "channels_last": True, "schedule": "cyclic"}
    config = Config(**{**common, **settings, **(tiny if suite.dry else full)})
    config = config.resolve(data)
    folder = suite.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, data, folder, device=suite.device, display=Display())
    if (folder / "checkpoint.pt").exists():
        trainer.restore(checkpoint.load(folder / "checkpoint.pt"))
    spent["set up"] = time.perf_counter() - begin - sum(spent.values())
    trainer.fit()
    records = list(trainer.records)
    epochs = sum(r["seconds"] for r in records)
    spent |= {"first epoch": records[0]["seconds"], "other epochs": epochs - records[0]["seconds"]}
    model = load_model(folder).model.to(suite.device)  # in float32, whatever it was trained in
    found: dict[str, Any] = {
        "environment": harness.environment(torch.device(suite.device)),
        "data": data.name,
        "config": config.to_dict(),
        "eps": config.eps,
        "graphs": str(getattr(trainer.objective.attack, "graphs", "")),
        "curve": records,
        "seconds": spent,
    }
    write(suite.out / f"{name}.json", found)
    x, y = data.test_x, data.test_y
    began = time.perf_counter()
    report = evaluate(model, x, y, eps=config.eps, progress=None)
    found["accuracy"] = {row.name: row.accuracy for row in report.rows}
    part = slice(0, 4 if suite.dry else 1000)
    margin = effective_margin(model, x[part].to(suite.device), y[part].to(suite.device))
    found["effective margin, median"] = margin.double().median().item()
    spent["evaluation"] = time.perf_counter() - began
    write(suite.out / f"{name}.json", found)
    began = time.perf_counter()
    attack = AutoAttack(model, eps=config.eps, seed=0, progress=None)
    if suite.dry:
        for planned in attack.plan.values():
            planned.steps = 2
    report = evaluate(model, x[part], y[part], eps=config.eps, attacks=attack, progress=None)
    found["accuracy"]["AutoAttack"] = report.worst.accuracy
    found["AutoAttack on"] = len(y[part])
    spent["AutoAttack"] = time.perf_counter() - began
    write(suite.out / f"{name}.json", found)
    return trainer, data, found


def _data(suite: Suite) -> Any:
    from dataclasses import replace

    from pyadv import data

    if suite.dry:
        small = data.load("fashion-mini")
        few = {k: getattr(small, k)[:64] for k in ("train_x", "train_y", "test_x", "test_y")}
        return replace(small, **few)
    if suite.data is None:
        sys.exit("training wants --data")
    if suite.data.suffix != ".xz":
        return data.load(suite.data)
    decoded = suite.runs / "decoded.npz"
    if not decoded.exists():
        _decode(suite.data, decoded)
    name = suite.data.name.split(".")[0]
    return replace(data.load(decoded, layout="NHWC"), name=f"{name} (JPEG copy)")


def _decode(path: Path, target: Path) -> None:
    import numpy as np
    from PIL import Image

    files = np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False)
    ends = np.cumsum(files["lengths"], dtype=np.int64)
    begins = ends - files["lengths"]
    jpeg = files["jpeg"].tobytes()
    x = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(jpeg[a:b])).convert("RGB"))
            for a, b in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
    )
    y, n = files["labels"].astype(np.int64), int(files["n_train"])
    np.savez(target, x_train=x[:n], y_train=y[:n], x_test=x[n:], y_test=y[n:])


# The result.


def summary(suite: Suite) -> None:
    """DIR/summary.md and its picture, of what is there."""
    import gpu_attacks
    import gpu_kernels
    import render
    import torch
    import training

    environment = harness.environment(torch.device(suite.device))
    lines = [f"# {environment['device']}\n", *(f"- {k}: {v}" for k, v in environment.items())]
    if suite.dry:
        lines.append("\n**A dry run on the CPU at tiny sizes: it says nothing about speed.**")
    lines += ["\n## Stages\n", "| stage | ended | seconds |", "|---|---|---|"]
    lines += [f"| {k} | {v['state']} | {v['seconds']} |" for k, v in suite.status.items()]
    questions = {"gpu_kernels": gpu_kernels, "gpu_attacks": gpu_attacks, "training": training}
    there = {k: suite.out / f"{k}.json" for k in questions}
    found = {k: harness.load(p) for k, p in there.items() if p.exists()}
    if found:
        lines += ["\n## Goals\n", render._goals({k: questions[k] for k in found}, found)]
    for name, (_, rows) in found.items():
        lines += [f"\n## {questions[name].TITLE}\n", render.text(questions[name], rows)]
    lines += _counted(suite.out / "ncu.csv") + _networks(suite)
    if "gpu_kernels" in found:
        with contextlib.suppress(ImportError):  # matplotlib
            _picture(found["gpu_kernels"][1], suite.out / "kernels.png")
            lines.append("\n![Share of the copy's bandwidth](kernels.png)")
    (suite.out / "summary.md").write_text("\n".join(lines) + "\n")


def _counted(path: Path) -> list[str]:
    """What Nsight Compute has counted, a line for each launch."""
    if not path.exists():
        return []
    text = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(text):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:60]})
        launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    head = ["kernel", *_COUNTERS]
    lines = ["\n## Counters\n", render_line(head), render_line(["---"] * len(head))]
    return lines + [render_line([v.get(k, "") for k in head]) for v in launches.values()]


def _networks(suite: Suite) -> list[str]:
    there = [n for n in ("record", *METHODS) if (suite.out / f"{n}.json").exists()]
    if not there:
        return []
    found = {n: json.loads((suite.out / f"{n}.json").read_text()) for n in there}
    attacks = list(dict.fromkeys(a for f in found.values() for a in f.get("accuracy", {})))
    head = ["network", "epochs", *attacks, "median margin", "minutes of training", "seconds of"]
    lines = [f"\n## Networks on {found[there[0]]['data']}\n", render_line(head)]
    lines.append(render_line(["---"] * len(head)))
    for name, f in found.items():
        accuracy = f.get("accuracy", {})
        minutes = (f["seconds"]["first epoch"] + f["seconds"]["other epochs"]) / 60
        margin = f.get("effective margin, median")
        lines.append(
            render_line(
                [
                    name,
                    str(f["config"]["epochs"]),
                    *(f"{100 * accuracy[a]:.2f}" if a in accuracy else "" for a in attacks),
                    "" if margin is None else f"{margin:.4f}",
                    f"{minutes:.2f}",
                    ", ".join(f"{k} {v:.1f}" for k, v in f["seconds"].items()),
                ]
            )
        )
    speeds = found.get("record", {}).get("PGD-10", {})
    other = found.get("record", {}).get("otherwise", {})
    lines += [
        f"- PGD-10, speed {k}: {100 * v:.2f} % left, {other[k]} verdicts not those of exact"
        for k, v in speeds.items()
    ]
    profile = found.get("record", {}).get("profile")
    if profile:
        lines += [f"\nA training step takes {1000 * profile['seconds of a step']:.2f} ms; busy for"]
        lines[-1] += f" {100 * profile['busy']:.0f} % of it:\n"
        lines += [f"- {100 * v:.1f} % {k[:100]}" for k, v in profile["shares"].items()]
    return lines


def render_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture(rows: list[harness.Row], path: Path) -> None:
    from matplotlib.figure import Figure

    copies = {r.case: r for r in rows if r.provider == "copy_" and r.times_us}
    shares = {
        r.case: r.gigabytes_per_second / copies[r.case].gigabytes_per_second
        for r in rows
        if r.provider == "pyadv" and r.times_us and r.bytes and r.case in copies
    }
    figure = Figure(figsize=(8, 1 + 0.2 * len(shares)), layout="constrained")
    axis = figure.add_subplot()
    axis.barh(range(len(shares)), list(shares.values()))
    axis.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axis.axvline(0.9, color="black", linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set_xlabel("share of the copy's bandwidth")
    figure.savefig(path, dpi=110)


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all stages together")
    parser.add_argument("--data", type=Path, help="colour images to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="for checkpoints")
    parser.add_argument("--again", action="store_true", help="also stages that are done")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    for name in ("out", "runs", "data"):
        path = getattr(options, name)
        setattr(options, name, None if path is None else path.absolute())
    return options


def main() -> None:
    given = arguments()
    harness.use_checkout()
    suite = Suite(given)
    if given.within:
        settings = METHODS.get(given.within)
        part = globals().get(given.within)
        _trained(suite, given.within, settings) if settings else part(suite)
        return
    suite.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    states = []
    for name in given.only or STAGES:
        left = end - time.monotonic()
        done = suite.status.get(name, {}).get("state") == "done"
        if done and not given.again:
            print(f"{name}: done before")
            continue
        if left < 5:
            print(f"{name}: no time left")
            continue
        states.append(suite.run(name, min(left, 60 * STAGES[name].minutes)))
        print(f"{name}: {states[-1]}, {suite.status[name]['seconds']} s", flush=True)
        summary(suite)
    print(f"results in {suite.out}")
    sys.exit(1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
