"""Runs cases of the areas in worker processes, goes on after findings, and ends with a table.

    python -m tests.fuzz [areas] [--seed S] [--cases N | --minutes M] [--limit SECONDS]
    python -m tests.fuzz ops --seed 0 --case 123         # one case again, in this process

A worker that crashes or takes longer than the limit for one case is a finding like any other: its
stack is printed and the next worker begins after that case. The exit code is 1 where there were
findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.case import REFUSED, RIGHT, Draw, Finding

AREAS = ("ops", "attacks", "objectives", "evaluation", "config")
FOUND = "finding"
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """How a case ended: RIGHT, REFUSED or FOUND, with what was found."""

    area: str
    seed: int
    number: int
    verdict: str
    text: str = ""

    @property
    def line(self) -> str:
        """The command that runs the case again."""
        return f"python -m tests.fuzz {self.area} --seed {self.seed} --case {self.number}"


def run_case(area: str, seed: int, number: int) -> Outcome:
    """One case in this process."""
    draw = Draw(area, seed, number)
    try:
        return Outcome(area, seed, number, importlib.import_module(f"fuzz.{area}").case(draw))
    except Finding as finding:
        text = str(finding)
    except Exception:
        text = "unexpected exception\n" + "".join(traceback.format_exc().splitlines(True)[-14:])
    notes = "".join(f"\n    {name} = {value}" for name, value in draw.notes.items())
    return Outcome(area, seed, number, FOUND, text + notes)


def search(
    area: str, seed: int, cases: int, limit: float = 60.0, until: float | None = None
) -> Iterator[Outcome]:
    """Cases 0, 1, ... of one area in worker processes, up to `cases` or the time `until`."""
    number = 0
    while number < cases:
        for outcome in _from_worker(area, seed, number, cases, limit):
            yield outcome
            number = outcome.number + 1
            if until is not None and time.monotonic() > until:
                return


def _from_worker(area: str, seed: int, first: int, cases: int, limit: float) -> Iterator[Outcome]:
    """What one worker reports, and a finding for the case in which it died."""
    words = [sys.executable, "-m", "tests.fuzz", area, "--seed", str(seed), "--limit", str(limit)]
    words += ["--worker", str(first), "--cases", str(cases)]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        worker = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_REPOSITORY
        )
        number = first
        try:
            for line in worker.stdout:
                if line.startswith('{"area"'):
                    outcome = Outcome(**json.loads(line))
                    number = outcome.number + 1
                    yield outcome
        finally:
            worker.terminate()
            worker.wait()
        if number < cases:
            errors.seek(0)
            tail = "".join(errors.readlines()[-60:])
            yield Outcome(area, seed, number, FOUND, f"died or hung ({worker.returncode})\n{tail}")


def _work(area: str, seed: int, first: int, cases: int, limit: float) -> None:
    """The worker: a line of JSON for each case. A case over the limit ends the process with the
    stacks of all threads."""
    import torch

    from pyadv import _native

    if library := os.environ.get("PYADV_TEST_CUDA_ON_CPU"):  # kernels with sanitizers
        torch.ops.load_library(library)
    _native.load()  # which may compile, in its own time
    torch.set_num_threads(1)
    faulthandler.enable()
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the code under test prints must not mix with the reports
    for number in range(first, cases):
        faulthandler.dump_traceback_later(limit, exit=True)
        outcome = run_case(area, seed, number)
        reports.write(json.dumps(vars(outcome)) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="area", help=f"of {', '.join(AREAS)}; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None, help="of each area; 1000")
    parser.add_argument("--minutes", type=float, default=None, help="for each area")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--case", type=int, default=None, help="run this one, in this process")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    areas = options.areas or list(AREAS)
    cases = options.cases or (1000 if options.minutes is None else sys.maxsize)
    if options.worker is not None:
        _work(areas[0], options.seed, options.worker, cases, options.limit)
        return 0
    if options.case is not None:
        found = [run_case(area, options.seed, options.case) for area in areas]
        for outcome in found:
            print(f"{outcome.line}: {outcome.verdict}\n{outcome.text}")
        return int(any(outcome.verdict == FOUND for outcome in found))
    counts = {area: Counter() for area in areas}
    for area in areas:
        begin = said = time.monotonic()
        until = None if options.minutes is None else begin + 60 * options.minutes
        for outcome in search(area, options.seed, cases, options.limit, until):
            counts[area][outcome.verdict] += 1
            if outcome.verdict == FOUND:
                print(f"\n{outcome.line}\n  {outcome.text}", flush=True)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                print(_row(area, counts[area], said - begin), file=sys.stderr, flush=True)
        counts[area]["seconds"] = time.monotonic() - begin
    print(f"\n{'area':<12}{'cases':>8}{RIGHT:>14}{REFUSED:>13}{'findings':>10}{'seconds':>9}")
    for area in areas:
        print(_row(area, counts[area], counts[area]["seconds"]))
    total = sum(c[FOUND] for c in counts.values())
    print(f"{total} findings")
    return int(total > 0)


def _row(area: str, count: Counter, seconds: float) -> str:
    cases = count[RIGHT] + count[REFUSED] + count[FOUND]
    numbers = f"{cases:>8}{count[RIGHT]:>14}{count[REFUSED]:>13}{count[FOUND]:>10}"
    return f"{area:<12}{numbers}{seconds:>9.0f}"
