"""Affine maps with a ReLU, and their gradient, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.tensors import finish, widen


def affine_relu(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    added: Tensor | None = None,
    slope: float = 0.0,
    keep_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return relu((x + added) * scale + shift), and x + added if `keep_sum`. See
    `ops.affine_relu`."""
    y, total = affine_relu_and_sum(x, scale, shift, added, slope, keep_sum)
    return (y, total) if keep_sum else y


def affine_relu_and_sum(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    slope: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """Return what `affine_relu` returns as the op does: without `keep_sum` the sum is empty."""
    total = x if added is None else x + added
    v = widen(total)
    if scale is not None:
        v = v * _channels(scale, x)
    if shift is not None:
        v = v + _channels(shift, x)
    kept = finish(total, x, None) if keep_sum else x.new_empty(0)
    return finish(_below_zero(v, v, slope), x, None), kept


def affine_relu_backward(
    y: Tensor,
    grad: Tensor,
    other: Tensor | None = None,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    slope: float = 0.0,
) -> Tensor:
    """Return (grad + other) * relu'(y) * scale + added. See `ops.affine_relu_backward`."""
    g = widen(grad) if other is None else widen(grad) + widen(other)
    g = _below_zero(y, g, slope)
    if scale is not None:
        g = g * _channels(scale, y)
    if added is not None:
        g = g + widen(added)
    return finish(g, y, None)


def _below_zero(sign: Tensor, v: Tensor, slope: float) -> Tensor:
    return torch.where(sign <= 0, v * slope if slope else 0.0, v)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.dim() - 2))
