"""Learning rates as functions of progress: nothing to save, nothing to step."""

from __future__ import annotations

import bisect
import math

SCHEDULES = ("constant", "piecewise", "cosine", "cyclic")
_PEAK = 0.4  # where the cyclic schedule turns (Rice et al. 2020, "superconverge")


def lr_factor(
    schedule: str,
    progress: float,
    milestones: tuple[float, ...] = (),
    factors: tuple[float, ...] = (),
) -> float:
    """Factor of the peak learning rate at `progress` in [0, 1], the share of steps done.

    - "piecewise": times 0.1 at each of `milestones`, or from each of them on its one of `factors`;
    - "cosine": half a period, from 1 to 0;
    - "cyclic": linearly 0 to 1 over the first 0.4 of the run, then to 0.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "piecewise":
        passed = bisect.bisect_right(sorted(milestones), progress)
        return (1.0, *factors)[passed] if factors else 0.1**passed
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "cyclic":
        return min(progress / _PEAK, (1 - progress) / (1 - _PEAK))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
