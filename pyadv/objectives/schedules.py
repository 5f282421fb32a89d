"""What changes from epoch to epoch: functions of the epoch, counted from 1."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping


class Piecewise:
    """`before`, and from each epoch of `steps` on its value.

    GAIRAT's lambda after a burn-in: `Piecewise(math.inf, {60: -1.0, 90: -2.0, 110: -2.5})`. The
    official schedule of this name means these values and never reaches the second (its first
    branch catches every later epoch).
    """

    def __init__(self, before: float, steps: Mapping[int, float]):
        self.epochs = sorted(steps)
        self.values = [before, *(steps[e] for e in self.epochs)]

    def __call__(self, epoch: int) -> float:
        return self.values[bisect.bisect_right(self.epochs, epoch)]


class Linear:
    """`start` up to epoch `first`, `end` from epoch `last` on, a straight line between.

    Both values must be finite: the official code's line starts at its default lambda of infinity
    and stays there or is NaN.
    """

    def __init__(self, start: float, end: float, first: int, last: int):
        if not (math.isfinite(start) and math.isfinite(end)):
            raise ValueError(f"start and end must be finite, got {start} and {end}")
        if first >= last:
            raise ValueError(f"first must be < last, got {first} and {last}")
        self.start, self.end, self.first, self.last = start, end, first, last

    def __call__(self, epoch: int) -> float:
        share = min(max((epoch - self.first) / (self.last - self.first), 0.0), 1.0)
        return self.start + share * (self.end - self.start)


# The tau of the official codes.
fat_tau = Piecewise(0, {51: 1, 91: 2})  # FAT, 120 epochs
fat_trades_tau = Piecewise(0, {31: 1, 51: 2, 71: 3})  # FAT for TRADES, 85 epochs
fat_mart_tau = Piecewise(0, {21: 1, 41: 2, 61: 3, 81: 4})  # FAT for MART, 90 epochs
gair_fat_tau = Piecewise(0, {41: 3, 71: 6})  # GAIR-FAT, 120 epochs
