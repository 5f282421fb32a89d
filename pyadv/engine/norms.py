"""Norms of rows and distances between points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyadv.tensors import flatten, widen

ORDER = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}


def row_norm(t: Tensor, order: float) -> Tensor:
    """Return the norm of each row, (B,); 0 for rows without entries."""
    t = flatten(t)
    if not t.shape[1]:
        return t.new_zeros(len(t))
    if order == math.inf:  # takes a tenth of the time of vector_norm on the CPU
        return t.abs().amax(1)
    return torch.linalg.vector_norm(t, order, dim=1)


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Return the distance of each pair of rows, (B,) in float32 or float64; in L0 the number of
    entries that differ."""
    return row_norm(widen(x_adv) - widen(x), ORDER[norm])
