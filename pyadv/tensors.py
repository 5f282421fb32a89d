"""What the references share: widening, row broadcasting, box."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit floats are widened to float32 for arithmetic and rounded once."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to broadcast against `like` (B, ...)."""
    return values.reshape(values.shape + (1,) * (like.dim() - 1))


def rows(t: Tensor) -> Tensor:
    """(B, ...) -> (B, n)"""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def parameter(value: float | Tensor, like: Tensor) -> Tensor:
    """A float, 0-dim, per-sample (B,) or broadcastable parameter in the type and on the device of
    `like`."""
    if not isinstance(value, Tensor):  # filled on the device: a copy would wait for it
        return torch.full((), value, dtype=like.dtype, device=like.device)
    t = value.to(like.device, like.dtype)
    return per_row(t, like) if t.dim() == 1 else t


def largest(values: Tensor, count: Tensor) -> Tensor:
    """Return a mask of the `count` (B,) entries of largest magnitude of each row; among equals, the
    first."""
    order = rows(values).abs().argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view(values.shape)
    return rank < per_row(count, values)


def clip_to_box(v: Tensor, lo: float | Tensor | None, hi: float | Tensor | None) -> Tensor:
    if lo is not None:
        v = torch.maximum(v, parameter(lo, v))
    if hi is not None:
        v = torch.minimum(v, parameter(hi, v))
    return v


def keep_inactive(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    """Rows that are not active come back bit for bit."""
    return new if active is None else torch.where(per_row(active, new), new, old)


def movable(grad: Tensor, active: Tensor | None) -> Tensor:
    """Rows with a gradient of finite numbers, among the active ones."""
    finite = rows(grad).isfinite().all(1)
    return finite if active is None else finite & active


def finish(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    """Round once to the dtype of `old`, keep its inactive rows and its memory layout."""
    result = keep_inactive(new.to(old.dtype), old, active)
    return torch.empty_like(old).copy_(result) if result.stride() != old.stride() else result
