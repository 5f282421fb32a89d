"""Norms of rows and distances between points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyadv.tensors import flatten, widen

ORDER = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}


def row_norm(t: Tensor, order: float) -> Tensor:
    """Return the norm of each row, (B,), also of rows without entries."""
    t = flatten(t)
    if not t.shape[1]:
        return t.new_zeros(len(t))
    if order == math.inf:  # on the CPU in a tenth of vector_norm's time
        return t.abs().amax(1)
    return torch.linalg.vector_norm(t, order, dim=1)


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Return the distance of each row, (B,) in float32 or float64; in L0 the number of entries that
    differ."""
    return row_norm(widen(x_adv) - widen(x), ORDER[norm])
