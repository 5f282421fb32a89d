"""Rounding of 16-bit iterates into the ball.

A step is computed in float32 and rounded once, to the nearest value of the dtype of x. In 16 bits
this can leave the ball by half a unit in the last place: in bfloat16 by 12 % of eps = 8/255.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.engine.norms import ORDER
from pyadv.engine.task import FloatOrTensor
from pyadv.menus import AnyNorm
from pyadv.tensors import broadcastable, keep_inactive, per_row, row_norm

_LOW = (torch.float16, torch.bfloat16)
_SHRINKS = (1e-4, 1e-3)  # by which a row is shortened before it is rounded to the nearest values


def leaves_by_rounding(dtype: torch.dtype) -> bool:
    """Return whether steps in this dtype need `round_inward_`."""
    return dtype in _LOW


def round_inward_(
    x_adv: Tensor, x: Tensor, eps: FloatOrTensor, norm: AnyNorm, active: Tensor | None = None
) -> None:
    """Move what lies outside the ball of radius eps around x to values of the dtype inside, towards
    x, in place. Rows inside, and those that are not active, stay as they are. Nothing is read from
    the device."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    centre = x.to(dtype)
    offset = x_adv.to(dtype) - centre
    limit = broadcastable(eps, offset)
    if norm == "Linf":
        outside = offset.abs() > limit
        result = torch.where(outside, _towards(x_adv, x), x_adv)
        x_adv.copy_(keep_inactive(result, x_adv, active))
        return
    limit = limit.expand(len(x), *limit.shape[1:]).reshape(-1) if limit.dim() else limit
    order, result = ORDER[norm], x_adv
    length = row_norm(offset, order)
    for shrink in _SHRINKS:
        shorter = centre + offset * per_row((1 - shrink) * limit / length, offset)
        result = _inside_or(result, shorter.to(x.dtype), centre, limit, order)
    # Rounded towards x in each entry, a row cannot become longer than it was.
    shorter = centre + offset * per_row((1 - _SHRINKS[0]) * limit / length, offset)
    nearest = shorter.to(x.dtype)
    too_far = (nearest.to(dtype) - centre).abs() > (shorter - centre).abs()
    result = _inside_or(
        result, torch.where(too_far, _towards(nearest, x), nearest), centre, limit, order
    )
    x_adv.copy_(keep_inactive(result, x_adv, active))


def _inside_or(point: Tensor, other: Tensor, centre: Tensor, limit: Tensor, order: float) -> Tensor:
    """Return the rows of `point` that lie inside, and those of `other` for the rest."""
    outside = row_norm(point.to(centre.dtype) - centre, order) > limit
    return torch.where(per_row(outside, point), other, point)


def _towards(point: Tensor, x: Tensor) -> Tensor:
    """Return the next values of the dtype from `point` towards x; where they are equal, x."""
    key, end = _key(point), _key(x)
    key = key + torch.sign(end - key)
    return torch.where(key < 0, ~0x7FFF | -key, key).to(torch.int16).view(point.dtype)


def _key(t: Tensor) -> Tensor:
    """Return int32 numbers in the order of the values of a 16-bit tensor, without gaps."""
    bits = t.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
