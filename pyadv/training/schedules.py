"""Learning rates as functions of progress: schedules without a state."""

from __future__ import annotations

import bisect
import math
from typing import Literal, TypeAlias, get_args

ScheduleName: TypeAlias = Literal["constant", "piecewise", "cosine", "cyclic"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
_PEAK = 0.4  # progress at the peak of the cyclic schedule (Rice et al. 2020, "superconverge")


def lr_factor(
    schedule: ScheduleName,
    progress: float,
    milestones: tuple[float, ...] = (),
    factors: tuple[float, ...] = (),
) -> float:
    """Return the factor of the peak learning rate at `progress`, the share of steps done.

    - "piecewise": the factor falls to a tenth at each of `milestones`, or takes the matching one of
      `factors` from each milestone on;
    - "cosine": half a period, from 1 to 0;
    - "cyclic": linear from 0 to 1 over the first 0.4 of the run, then linear to 0.
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
