"""Run the benchmarks, one question a file: the cost of pyadv against other implementations.

    python benchmarks/run.py [ops attacks fast training evaluation startup scaling
                             anatomy]
                             [--quick] [--against peers] [--threads 1 2] [--clock wall|cpu]
                             [--device cpu|cuda] [--out DIR] [--site DIR]

Each question checks the results of its providers, times them in turns, prints a table and writes
its rows to DIR/<question>.json. A full run takes about half an hour. `--quick` takes seconds and
says nothing about speed. `python benchmarks/render.py` writes docs/benchmarks.md from the results.

`strength` is asked by name only. It compares how strong attacks are, which no other load on the
machine changes, in about 15 minutes of one core; its page is docs/strength.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import harness
from questions import GPU_QUESTIONS, OWN_PAGES, QUESTIONS


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to check that all runs")
    parser.add_argument(
        "--against",
        default="peers",
        help='"peers" for all that can be imported (the default), "none", or names with commas',
    )
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads; one measurement each")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the CPU time of this process, for one thread on a busy machine; startup, which "
        "times other processes, is then left out",
    )
    parser.add_argument("--device", default="cuda" if _cuda() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--site", type=Path, help="folder of libraries to compare with")
    options = parser.parse_args(given)
    unknown = sorted(set(options.questions) - {*QUESTIONS, *OWN_PAGES, *GPU_QUESTIONS})
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu adds up the time of all threads, so it needs --threads 1")
    if unknown:
        known = (*QUESTIONS, *OWN_PAGES)
        meant = _meant(unknown[0], known)
        parser.error(f"questions are {', '.join(known)}; got {', '.join(unknown)}{meant}")
    return options


def main() -> None:
    given = arguments()
    harness.tuned_heap()
    harness.use_checkout()
    harness.use_site(given.site)
    import peers
    import render
    import torch

    device = torch.device(given.device)
    versions = peers.installed()
    against = _against(given.against, versions)
    environment = {**harness.environment(device), "peers": versions, "clock": given.clock}
    results = harness.HERE / "results"  # only a checkout has it
    base = results if results.is_dir() else Path("pyadv-bench")
    out = given.out or base / harness.folder_name(device)
    wrong = []
    for name in given.questions or QUESTIONS:
        question = importlib.import_module(name)
        measure = getattr(question, "measure", harness.measure)  # "strength" times nothing
        rows, begin = [], time.perf_counter()
        for n in _threads(given, device, getattr(question, "THREADS", None)):
            options = harness.Options(device, n, given.quick, against, given.clock)
            with harness.threads(n), peers.quiet():
                for case in question.cases(options):
                    rows += measure(case, options)
                    seconds = round(time.perf_counter() - begin, 1)  # so far, in case it is stopped
                    harness.save(out / f"{name}.json", {**environment, "seconds": seconds}, rows)
                    print(f"\r{name}: {case.name[:70]:<70}", end="", file=sys.stderr, flush=True)
        print(f"\r{name}: {time.perf_counter() - begin:.0f} s{'':<70}\n", file=sys.stderr)
        print(render.text(question, rows))
        # A peer's error is a finding for the page; an error of pyadv is a failure.
        wrong += [f"{r.case}: {r.provider}: {r.refused}" for r in rows if r.refused and not r.peer]
    print(f"results in {out}")
    if wrong:
        sys.exit("not timed:\n" + "\n".join(wrong))


def _against(wanted: str, versions: dict[str, str | None]) -> tuple[str, ...]:
    there = tuple(name for name, version in versions.items() if version)
    if wanted in ("peers", "none"):
        return there if wanted == "peers" else ()
    names = tuple(wanted.split(","))
    missing = [name for name in names if name not in there]
    if missing:
        meant = _meant(missing[0], (*versions, "peers", "none"))
        sys.exit(
            f"--against: cannot import {', '.join(missing)}; "
            f"can import {', '.join(there) or 'no other library'}{meant}"
        )
    return names


def _meant(name: str, known: tuple[str, ...]) -> str:
    harness.use_checkout()
    from pyadv._names import did_you_mean

    return did_you_mean(name, known)


def _threads(given: argparse.Namespace, device, wanted) -> list[int]:
    """Return the numbers of threads to measure with: those of the command line, else all cores,
    and also one thread if the question wants that."""
    if given.threads:
        return given.threads
    if given.quick:
        return [1]
    from pyadv._provenance import cores

    both = wanted == "one and all" and device.type == "cpu"
    return sorted({1, cores()}) if both else [cores()]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
