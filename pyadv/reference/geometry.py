"""Geometry values and early stop, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def track(correct: Tensor, kappa: Tensor, active: Tensor, patience: Tensor) -> None:
    """Count correct iterates and release rows whose patience is used up. See `ops.track`."""
    wrong = active & ~correct
    kappa.add_(active & correct)
    released = wrong & (patience == 0)
    patience.sub_((wrong & ~released).to(torch.int64))
    active.logical_and_(~released)
