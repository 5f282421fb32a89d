"""Schedules: functions of the epoch, counted from 1."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping


class Piecewise:
    """A schedule that is `before` at first and takes a new value at each epoch in `steps`.

    GAIRAT's lambda after a burn-in is `Piecewise(math.inf, {60: -1.0, 90: -2.0, 110: -2.5})`. The
    official schedule of this name lists these values but never reaches the second, because its
    first branch also matches all later epochs.
    """

    def __init__(self, before: float, steps: Mapping[int, float]):
        self.epochs = sorted(steps)
        self.values = [before, *(steps[e] for e in self.epochs)]

    def __call__(self, epoch: int) -> float:
        return self.values[bisect.bisect_right(self.epochs, epoch)]


class Linear:
    """A schedule: `start` until epoch `first`, `end` from epoch `last` on, linear between.

    Both values must be finite. The official schedule starts at its default lambda, infinity, and
    is infinite or NaN at every epoch.
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


# Schedules of tau in the official codes, with the number of epochs they are written for.
fat_tau = Piecewise(0, {51: 1, 91: 2})  # FAT, 120 epochs
fat_trades_tau = Piecewise(0, {31: 1, 51: 2, 71: 3})  # FAT for TRADES, 85 epochs
fat_mart_tau = Piecewise(0, {21: 1, 41: 2, 61: 3, 81: 4})  # FAT for MART, 90 epochs
gair_fat_tau = Piecewise(0, {41: 3, 71: 6})  # GAIR-FAT, 120 epochs
