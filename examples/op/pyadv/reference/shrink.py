"""Soft thresholding in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from pyadv.tensors import broadcastable, finish, widen


def shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """x - min(max(x, -threshold), threshold). See `ops.shrink`."""
    wide = widen(x)
    limit = broadcastable(threshold, wide)
    return finish(wide - wide.clamp(-limit, limit), x, None)
