"""The timing harness: check the results, interleave the providers, keep every sample.

A question (`ops.py`, `attacks.py`, ...) yields cases. A case holds providers, which do the same
work in different ways. `measure` calls each provider once and compares its result with the expected
one, so that no wrong result is timed. Then the providers take turns in random order. Ratios are
taken round by round, because other load on the machine disturbs them least.

The time of eager code varies several-fold with the state of the C heap, because a fresh output
tensor pays for its pages. `tuned_heap()` restarts the process with a heap that keeps its pages,
which favours eager code; every result says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def tuned_heap() -> None:
    """Restart this script with a heap that keeps its pages, unless it already has one."""
    if any(os.environ.get(k) != v for k, v in HEAP.items()):
        quiet = {"KINETO_LOG_LEVEL": "99"}  # silences the profiler, which measures peak memory
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP, **quiet})


def use_checkout() -> None:
    """Measure the checkout that this folder is part of, also in subprocesses, even if another pyadv
    is installed."""
    root = str(HERE.parent)
    if (HERE.parent / "pyadv").is_dir():
        sys.path.insert(0, root)
        rest = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{rest}" if rest else root


def use_site(folder: Path | None) -> None:
    """Let this process import libraries from `folder`, after all that is installed: a second
    PyTorch in there must not take the place of the installed one."""
    if folder is not None:
        sys.path.append(str(folder.absolute()))


@dataclass(frozen=True)
class Options:
    """The options that a question is asked with."""

    device: torch.device
    threads: int
    quick: bool = False
    peers: tuple[str, ...] = ()  # installed and asked for
    clock: str = "wall"  # or "cpu", which other load does not disturb

    @property
    def steps(self) -> int:
        """The number of steps of an attack."""
        return 2 if self.quick else 10

    def least_and_most(self, least: int, most: int) -> tuple[int, int]:
        return (2, 2) if self.quick else (least, most)


@dataclass
class Provider:
    """One implementation of the work of a case.

    `bytes` is the least memory traffic of the work. `passes` counts the samples that went forward
    and backward through the network. A yardstick does other work than the case asks for and is not
    checked. `result` is a known result of a slow call, so that the check need not repeat it.
    """

    call: Callable[[], Any]
    bytes: int | None = None
    passes: tuple[int, int] | None = None
    peer: bool = False
    yardstick: bool = False
    facts: dict[str, float] = field(default_factory=dict)
    result: Any = None


@dataclass
class Case:
    """A set of providers to time against each other.

    `check(result)` returns the fault of a result, or None. Ratios are relative to the provider
    `ours`. `images` and `steps` are the samples and the attack steps of one call. `series` and `at`
    place the case on a curve of the page.
    """

    name: str
    providers: dict[str, Provider | Callable[[], Any]]
    check: Callable[[Any], str | None] | None = None
    ours: str = "pyadv"
    group: str = ""
    images: int = 0
    steps: int = 0
    series: str = ""
    at: float | None = None
    runs: tuple[int, int] = (30, 60)  # minimum and maximum
    budget_s: float = 3.0
    peak: bool = True


@dataclass
class Row:
    """The result of one provider in one case. `times_us` holds a sample per round, and the n-th
    samples of all providers of a case are from the same round. `refused` says why there are
    none."""

    case: str
    provider: str
    ours: str
    threads: int
    group: str = ""
    images: int = 0
    steps: int = 0
    bytes: int | None = None
    forwards: int | None = None
    backwards: int | None = None
    peak_bytes: int | None = None
    peer: bool = False
    yardstick: bool = False
    series: str = ""
    at: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    times_us: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        return statistics.median(self.times_us)

    @property
    def quartiles_us(self) -> tuple[float, float]:
        return quartiles(self.times_us)

    def per_second(self, count: int) -> float:
        return count / self.median_us * 1e6

    @property
    def gigabytes_per_second(self) -> float | None:
        return self.bytes / self.median_us / 1e3 if self.bytes else None


def commit_words(environment: dict[str, Any]) -> str:
    """Return " at " and the commit that was measured, or "" where it is not known."""
    commit = f" at {environment['commit']}" if environment["commit"] else ""
    return commit + (", with uncommitted changes" if environment["changed"] else "")


def time_words(us: float) -> str:
    """Return a time in the unit that suits its size."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(row: Row, other: Row) -> list[float]:
    """Return the ratio of a row's times to those of `other`, from the same case, round by round."""
    return [a / b for a, b in zip(row.times_us, other.times_us, strict=True)]


def measure(case: Case, options: Options) -> list[Row]:
    """Time the providers of a case after refusing those with a wrong result."""
    rows, calls = [], {}
    for name, given in case.providers.items():
        provider = given if isinstance(given, Provider) else Provider(given)
        forwards, backwards = provider.passes or (None, None)
        row = Row(
            case.name,
            name,
            case.ours,
            options.threads,
            case.group,
            case.images,
            case.steps,
            provider.bytes,
            forwards,
            backwards,
            peer=provider.peer,
            yardstick=provider.yardstick,
            series=case.series,
            at=case.at,
            facts=provider.facts,
        )
        rows.append(row)
        row.refused = _wrong(case, provider) or ""
        if not row.refused:
            calls[name] = provider.call
            if case.peak:
                row.peak_bytes = _peak(provider.call, options.device)
    samples = _interleave(case, calls, options)
    for row in rows:
        row.times_us = samples.get(row.provider, [])
    return rows


def _wrong(case: Case, provider: Provider) -> str | None:
    try:
        result = provider.call() if provider.result is None else provider.result
        return None if provider.yardstick or case.check is None else case.check(result)
    except Exception as error:  # a peer may raise anything, and the others must still be timed
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _interleave(
    case: Case, calls: dict[str, Callable[[], Any]], options: Options
) -> dict[str, list[float]]:
    clock = _clock(options)
    least_us = 50.0 if options.quick else 500.0  # a sample repeats a call until it takes this long
    repeats, round_s = {}, 0.0
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        once = clock(call, 1)
        samples[name].append(once)
        if once < least_us:
            once = min(clock(call, 1) for _ in range(4))
        repeats[name] = max(1, round(least_us / max(once, 0.1)))
        round_s += repeats[name] * once / 1e6
    if max(repeats.values(), default=1) > 1 or round_s < 1:  # otherwise that was the first round
        samples = {name: [] for name in calls}
    least, most = options.least_and_most(*case.runs)
    rounds = max(least, min(most, int(case.budget_s / max(round_s, 1e-9))))
    order = list(calls)
    shuffle = random.Random(0).shuffle
    while any(len(times) < rounds for times in samples.values()):
        shuffle(order)
        for name in order:
            samples[name].append(clock(calls[name], repeats[name]))
    return {name: [float(f"{t:.5g}") for t in times] for name, times in samples.items()}


def _clock(options: Options) -> Callable[[Callable[[], Any], int], float]:
    """Return a function that gives microseconds per call, by the host's clock or by CUDA events."""
    now = time.process_time_ns if options.clock == "cpu" else time.perf_counter_ns

    def host(call: Callable[[], Any], repeats: int) -> float:
        begin = now()
        for _ in range(repeats):
            call()
        return (now() - begin) / repeats / 1000

    def stream(call: Callable[[], Any], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(options.device)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats * 1000

    return stream if options.device.type == "cuda" else host


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of tensor memory during a call, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def close(expected: Any, rtol: float = 0.0, atol: float = 0.0) -> Callable[[Any], str | None]:
    """Return a check that all tensors are equal (bit for bit without tolerances), NaN to NaN."""

    def check(result: Any) -> str | None:
        for got, want in zip(_tensors(result), _tensors(expected), strict=True):
            got = got.to(want.dtype)  # the loss may be in half precision or float32
            if not torch.allclose(got, want, rtol, atol, equal_nan=True):
                worst = (got.double() - want.double()).abs().max().item()
                return f"differs from the reference by {worst:.3g}"
        return None

    return check


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


@dataclass(frozen=True)
class Goal:
    """A bound on a measured value. `ours` takes at most `at_most` times the time of `against`, or
    is at least `at_least` times as fast; `against` may be "peers", the fastest of them. Three
    fields change the bounded value: `fact` bounds that fact of the row; `beyond_s` bounds the
    difference of the two times, in seconds; `share_of` bounds that difference as a share of the
    time of `against` in another case."""

    text: str
    case: str
    against: str
    at_most: float | None = None
    at_least: float | None = None
    ours: str = "pyadv"
    fact: str | None = None
    beyond_s: float | None = None
    share_of: str | None = None

    def outcome(self, rows: Iterable[Row], threads: int) -> tuple[float, bool] | None:
        """Return the measured value and whether it meets the bound, or None without a
        measurement."""
        rows = [r for r in rows if r.threads == threads and r.times_us]
        mine = [r for r in rows if (r.case, r.provider) == (self.case, self.ours)]
        if self.fact:
            value = mine[0].facts.get(self.fact) if mine else None
            return None if value is None else (value, value <= self.at_most)
        others = [r for r in rows if r.case == self.case and self._is_against(r)]
        if not mine or not others:
            return None
        if self.beyond_s is not None or self.share_of:
            pairs = zip(mine[0].times_us, others[0].times_us, strict=True)
            beyond = statistics.median(a - b for a, b in pairs)
            if self.beyond_s is not None:
                return beyond / 1e6, beyond / 1e6 <= self.beyond_s
            whole = [r for r in rows if (r.case, r.provider) == (self.share_of, self.against)]
            value = beyond / whole[0].median_us if whole else None
            return None if value is None else (value, value <= self.at_most)
        value = max(statistics.median(ratios(mine[0], other)) for other in others)
        if self.at_most is not None:
            return value, value <= self.at_most
        return 1 / value, 1 / value >= self.at_least

    def _is_against(self, row: Row) -> bool:
        return row.peer if self.against == "peers" else row.provider == self.against

    @property
    def bound(self) -> str:
        if self.beyond_s is not None:
            return f"<= {self.beyond_s:g} s"
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return the facts about machine and software that a reader needs to interpret the numbers."""
    import pyadv
    from pyadv import _native
    from pyadv._provenance import cores, processor

    return {
        "device": device_name(device),
        **_card(device),
        "processor": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pyadv": pyadv.__version__,
        "kernels": _native.load().backend,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", *_CODE)),
        "heap": "tuned" if all(os.environ.get(k) == v for k, v in HEAP.items()) else "default",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {"cuda": torch.version.cuda, "driver": _output(query).partition("\n")[0]}


_CODE = ("--", ":(top)csrc", ":(top)pyadv", ":(top)benchmarks/*.py")


def device_name(device: torch.device) -> str:
    from pyadv._provenance import processor

    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def folder_name(device: torch.device) -> str:
    """Return the name of the results folder of today, such as "amd-epyc-2026-11-21"."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{name}-{time.strftime('%Y-%m-%d')}"


def save(path: Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """Write the results with one row per line. Empty fields are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({k: v for k, v in asdict(row).items() if v or k == "threads"}) for row in rows
    ]
    head = json.dumps(environment, indent=1)
    path.write_text(f'{{"environment": {head},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(path.read_text())
    return content["environment"], [Row(**row) for row in content["rows"]]


def _git(*args: str) -> str:
    """Return the output of a git command, or "" outside a checkout."""
    return _output(["git", *args])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
