"""All that is to be done on a card, by one command.

    python benchmarks/gpu_suite.py --out DIR [--only STAGE ...] [--first] [--minutes N]
                                   [--data FILE] [--runs DIR] [--site DIR] [--again] [--dry]

The stages, in order of worth:

    build       compile the kernels for the card
    tests       run all tests marked `cuda`: ops, attacks, graphs, compaction
    attacks     time PGD on ResNet-18 and WRN-34-10 against eager loops and the recorded floor
    autoattack  compare AutoAttack with pyautoattack, if that can be imported
    record      train a ResNet-18 for as many epochs as fill three minutes, then measure it
    kernels     measure bytes, time and share of the copy's bandwidth of each kernel
    reference   run the tests marked `cuda` without the CUDA kernels
    training    time training steps against the authors' form
    sanitizer   run compute-sanitizer's four tools over every kernel, at small odd sizes
    counters    run Nsight Compute on each kernel: bandwidth, registers, occupancy
    at gairat at-emr fat trades mail-at trades-emr
                train the methods at one budget; accuracies under PGD-20, margin PGD and AutoAttack

`--minutes 8 --first` stops after `kernels` and fits a quarter of an hour with a card, of which one
command may take ten minutes; the same command without `--first` continues with the rest.

Each stage is a process with a time limit, so that no stage takes the others down, and writes its
results to DIR at once. A finished stage is skipped, and training continues from its last checkpoint
in RUNS. `--minutes` bounds the whole run. `--site` names a folder with libraries to compare with,
for instance made by `pip install --target`. DIR/status.json says how each stage ended, DIR/log.txt
holds the output, DIR/summary.md is the result.

Training needs `--data`: a file that `pyadv.data.load` reads, or an .npz.xz of JPEG files (arrays
`jpeg`, the bytes of all files, `lengths`, `labels` and `n_train`), which needs Pillow. `--dry` runs
every stage on the CPU at tiny sizes, to check that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
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

import gpu_report
import gpu_stages
import harness
from gpu_report import COUNTERS
from gpu_stages import METHODS, Setting, write

ROOT = harness.HERE.parent
_GRACE = 60  # seconds for an interrupted training run to save its state


@dataclass(frozen=True)
class Stage:
    """One stage: `commands(suite)` run one after the other, within `minutes` on a card."""

    minutes: float
    commands: Callable[[Suite], list[list[str]]]


class Suite:
    """One folder of results and the commands that fill it."""

    def __init__(self, given: argparse.Namespace):
        self.setting = Setting(given.out, given.runs, given.data, given.dry)
        self.site: Path | None = given.site
        self.out, self.dry = given.out, given.dry
        self.status_file = self.out / "status.json"

    @property
    def status(self) -> dict[str, dict[str, Any]]:
        """How each stage ended and how many seconds it took."""
        there = self.status_file.exists()
        return json.loads(self.status_file.read_text()) if there else {}

    def python(self, *arguments: str) -> list[str]:
        """Return a command of this Python."""
        return [sys.executable, *arguments]

    def ask(self, question: str, *more: str, quick: bool = False) -> list[str]:
        """Return the command that asks one question of the benchmarks."""
        size = ["--quick"] if quick or self.dry else []
        where = ["--device", self.setting.device, "--threads", "1", "--out", str(self.out)]
        against = ["--site", str(self.site)] if self.site else ["--against", "none"]
        return self.python(str(harness.HERE / "run.py"), question, *against, *where, *size, *more)

    def within(self, part: str) -> list[str]:
        """Return the command that runs one part of gpu_stages.py."""
        more = ["--data", str(self.setting.data)] if self.setting.data else []
        more += ["--site", str(self.site)] if self.site else []
        dry = ["--dry"] if self.dry else []
        files = ["--out", str(self.out), "--runs", str(self.setting.runs)]
        return self.python(str(Path(__file__)), "--within", part, *files, *more, *dry)

    def run(self, name: str, seconds: float) -> str:
        """Run a stage and return how it ended: done, failed or stopped."""
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
    """Run a command and return its exit status, or None if the time was up. The command is
    interrupted first and killed later, so that training can save its state."""
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


def _reference(suite: Suite) -> list[list[str]]:
    """Return the tests on CUDA tensors with PYADV_CUDA=0, where the references run."""
    return [["env", "PYADV_CUDA=0", *command] for command in _tests(suite)]


_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def _sanitizer(suite: Suite) -> list[list[str]]:
    body = suite.within("every_kernel")
    if suite.dry or not shutil.which("compute-sanitizer"):
        return [body]
    # PyTorch's caching allocator would hide where a tensor ends. initcheck must see the writes of
    # all kernels; the other tools need our kernels only.
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


def _counters(suite: Suite) -> list[list[str]]:
    body = suite.within("large_kernels")
    if suite.dry or not shutil.which("ncu"):
        return [body]
    which = ["--kernel-name-base", "demangled", "-k", "regex:pyadv", "--clock-control", "none"]
    what = ["--metrics", ",".join(COUNTERS), "--csv", "--log-file", str(suite.out / "ncu.csv")]
    return [["ncu", *which, *what, *body]]


STAGES = {
    "build": Stage(3, lambda s: [s.within("build")]),
    "tests": Stage(3, _tests),
    "attacks": Stage(2, lambda s: [s.ask("gpu_attacks")]),
    "autoattack": Stage(3, lambda s: [s.within("autoattack")]),
    "record": Stage(9, lambda s: [s.within("record")]),
    "kernels": Stage(2, lambda s: [s.ask("gpu_kernels")]),
    "reference": Stage(3, _reference),
    "training": Stage(3, lambda s: [s.ask("training")]),
    "sanitizer": Stage(5, _sanitizer),
    "counters": Stage(3, _counters),
    **{name: Stage(9, lambda s, name=name: [s.within(name)]) for name in METHODS},
}
FIRST = ("build", "tests", "attacks", "autoattack", "record", "kernels")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line, with absolute paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE")
    parser.add_argument("--first", action="store_true", help=f"only {', '.join(FIRST)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all stages together")
    parser.add_argument("--data", type=Path, help="colour images to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="for checkpoints")
    parser.add_argument("--site", type=Path, help="folder of libraries to compare with")
    parser.add_argument("--again", action="store_true", help="repeat finished stages")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    for name in ("out", "runs", "data", "site"):
        path = getattr(options, name)
        setattr(options, name, None if path is None else path.absolute())
    return options


def main() -> None:
    given = arguments()
    harness.use_checkout()
    harness.use_site(given.site)
    suite = Suite(given)
    if given.within:
        gpu_stages.run(given.within, suite.setting)
        return
    suite.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    states = []
    for name in given.only or (FIRST if given.first else STAGES):
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
        gpu_report.summary(suite.setting, suite.status)
    print(f"results in {suite.out}")
    sys.exit(1 if "failed" in states else 0)


if __name__ == "__main__":
    main()
