"""One way to time: check the results first, then interleave the providers, report median and
spread.

The eager baseline moves several-fold with the state of the C heap, because a fresh output tensor
pays for its pages. `tuned_heap()` starts the process again with a heap that keeps its pages, which
favours eager; every row says so.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}


def tuned_heap() -> None:
    """Run this script again under a heap that keeps its pages, unless it does already."""
    if any(os.environ.get(k) != v for k, v in _HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_HEAP})


_CODE = ("--", ":(top)csrc", ":(top)pyadv")


@dataclass
class Row:
    """One provider in one case; times in microseconds, `share` relative to the copy of the case."""

    case: str
    provider: str
    median_us: float
    low_us: float  # quartiles
    high_us: float
    runs: int
    over_copy: float | None = None


Provider = Callable[[], Tensor]


def measure(
    case: str,
    providers: dict[str, Provider],
    expected: Tensor | None = None,
    *,
    unchecked: tuple[str, ...] = ("copy_",),
    runs: int = 60,
    least_us: float = 500.0,
) -> list[Row]:
    """Time the providers against each other.

    Each returns its result, which must equal `expected` (bit for bit) before anything is timed; the
    `unchecked` are yardsticks that compute something else. The providers take turns in random
    order, `runs` times; one sample repeats a call until it lasts `least_us`.
    """
    for name, provider in providers.items():
        result = provider()
        if expected is not None and name not in unchecked and not torch.equal(result, expected):
            worst = (result - expected).abs().max()
            raise AssertionError(f"{case}: {name} differs from the reference by {worst}")
    repeats = {name: _repeats(provider, least_us) for name, provider in providers.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for _ in range(runs):
        random.shuffle(order)
        for name in order:
            samples[name].append(_time(providers[name], repeats[name]))
    rows = [_row(case, name, times) for name, times in samples.items()]
    yardstick = {r.provider: r.median_us for r in rows}.get("copy_")
    for row in rows:
        row.over_copy = row.median_us / yardstick if yardstick else None
    return rows


def _time(call: Provider, repeats: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begin) / repeats / 1000


def _repeats(call: Provider, least_us: float) -> int:
    once = min(_time(call, 1) for _ in range(5))
    return max(1, round(least_us / max(once, 0.1)))


def _row(case: str, name: str, times: list[float]) -> Row:
    low, median, high = statistics.quantiles(times, n=4)
    return Row(case, name, median, low, high, len(times))


def environment() -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import pyadv

    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pyadv": pyadv.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", *_CODE)),
        "heap": "tuned" if all(os.environ.get(k) == v for k, v in _HEAP.items()) else "default",
        "date": time.strftime("%Y-%m-%d"),
    }


def save(path: Path, rows: list[Row], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), **more, "rows": [asdict(r) for r in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Markdown, a table for each case."""
    lines = []
    for case in dict.fromkeys(r.case for r in rows):
        lines += [
            f"**{case}**",
            "",
            "| provider | median us | quartiles | x copy_ |",
            "|---|---|---|---|",
        ]
        for r in (r for r in rows if r.case == case):
            share = f"{r.over_copy:.2f}" if r.over_copy else ""
            lines.append(
                f"| {r.provider} | {r.median_us:.0f} | {r.low_us:.0f} - {r.high_us:.0f} | {share} |"
            )
        lines.append("")
    return "\n".join(lines)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        return next(s.split(":")[1].strip() for s in info.splitlines() if "model name" in s)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
