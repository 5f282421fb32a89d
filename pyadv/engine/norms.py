"""Norms of rows and distances between points."""

from __future__ import annotations

import math

from torch import Tensor

from pyadv.menus import AnyNorm
from pyadv.tensors import row_norm, widen

ORDER: dict[AnyNorm, float] = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
DUAL: dict[AnyNorm, float] = {"Linf": 1, "L2": 2, "L1": math.inf}


def distance(x_adv: Tensor, x: Tensor, norm: AnyNorm) -> Tensor:
    """Return the distance of each pair of rows, (B,) in float32 or float64; in L0 the number of
    entries that differ."""
    return row_norm(widen(x_adv) - widen(x), ORDER[norm])
