"""Projections onto norm balls around x and onto the box, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import tensors
from pyadv.tensors import broadcastable, clip_to_box, finish, flatten, per_row, widen


def linf_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
) -> Tensor:
    """Return min(max(x_adv, x - eps), x + eps), clipped to the box. See `ops.linf_project`."""
    return finish(linf_clip(widen(x_adv), widen(x), eps, lo, hi), x_adv, None)


def l2_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    exact: bool = False,
) -> Tensor:
    """Project onto the ball, then onto the box; with `exact=True` onto their intersection. See
    `ops.l2_project`."""
    project = l2_box_clip if exact else l2_clip
    return finish(project(widen(x_adv), widen(x), eps, lo, hi), x_adv, None)


def l1_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
) -> Tensor:
    """Return the nearest point of the intersection of ball and box. See `ops.l1_project`."""
    return finish(l1_box_clip(widen(x_adv), widen(x), eps, lo, hi), x_adv, None)


def row_scale(t: Tensor) -> Tensor:
    """Return the largest |entry| of each row as (B, 1, ...); 1 where it is 0 or not finite."""
    if not t.numel():
        return per_row(t.new_ones(t.shape[:1]), t)
    largest = flatten(t).abs().amax(1)
    usable = (largest > 0) & largest.isfinite()
    return per_row(torch.where(usable, largest, torch.ones_like(largest)), t)


def row_norm(t: Tensor) -> Tensor:
    """Return L2 norms as (B, 1, ...). No square under- or overflows, whatever the entries' size."""
    scale = row_scale(t)
    return per_row(tensors.row_norm(t / scale, 2), t) * scale


def linf_clip(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> Tensor:
    radius = broadcastable(eps, v)
    return clip_to_box(torch.minimum(torch.maximum(v, x - radius), x + radius), lo, hi)


def l2_clip(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> Tensor:
    radius, norm = broadcastable(eps, v), row_norm(v - x)
    return clip_to_box(torch.where(norm > radius, x + (v - x) * (radius / norm), v), lo, hi)


def l2_box_clip(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> Tensor:
    """Return x + t (v - x), clipped to the box, for the largest t <= 1 that stays in the ball.

    The box stops an entry at t = room / |v - x|. Once it has stopped the first j entries, the
    squared norm is the sum of their squared rooms plus t^2 times the sum of the other squares;
    setting it to eps^2 gives t.
    """
    if not v.numel():
        return v
    d, room, radius = _offset_and_room(v, x, eps, lo, hi)
    holds, order = (room / d).nan_to_num(nan=torch.inf, posinf=torch.inf).sort(1)
    held = room.gather(1, order).square().cumsum(1)
    free = d.gather(1, order).square().flip(1).cumsum(1).flip(1)
    held, free = torch.cat([torch.zeros_like(held[:, :1]), held[:, :-1]], 1), free
    at_knot = held + (holds.square() * free).nan_to_num(nan=torch.inf)
    last = (at_knot < radius.square()).sum(1, keepdim=True).clamp(max=d.shape[1] - 1)
    t = ((radius.square() - held.gather(1, last)) / free.gather(1, last)).clamp(min=0).sqrt()
    outside = torch.minimum(d, room).square().sum(1, keepdim=True) > radius.square()
    shrunk = x + per_row(t[:, 0].to(v.dtype), v) * (v - x)
    return clip_to_box(torch.where(per_row(outside[:, 0], v), shrunk, v), lo, hi)


def l1_box_clip(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> Tensor:
    """Return x + sign(v - x) min(max(|v - x| - threshold, 0), room), at L1 distance eps from x.

    The distance is a piecewise linear function of the threshold. As the threshold falls, entry i
    starts to count at |d_i| and stops growing at |d_i| - room_i. The knots are sorted, and the
    threshold follows from the linear piece on which the distance is eps.
    """
    if not v.numel():
        return v
    d, room, radius = _offset_and_room(v, x, eps, lo, hi)
    knots, order = torch.cat([d, (d - room).clamp(min=0)], 1).sort(1, descending=True)
    sign = torch.where(order < d.shape[1], 1.0, -1.0).to(knots.dtype)
    count, total = sign.cumsum(1), (sign * knots).cumsum(1)
    last = (total - count * knots < radius).sum(1, keepdim=True).sub(1).clamp(min=0)
    slope, knot = count.gather(1, last), knots.gather(1, last)
    on_piece = (total.gather(1, last) - radius) / slope
    threshold = torch.where(slope > 0, on_piece, knot).clamp(min=0)  # rounding may miss eps
    outside = torch.minimum(d, room).sum(1, keepdim=True) > radius
    offset = v - x
    shrunk = (offset.abs() - per_row(threshold[:, 0].to(v.dtype), v)).clamp(min=0)
    shrunk = torch.minimum(shrunk, room.to(v.dtype).reshape(v.shape))
    shrunk = x + torch.copysign(shrunk, offset)
    return clip_to_box(torch.where(per_row(outside[:, 0], v), shrunk, v), lo, hi)


def _offset_and_room(
    v: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return as float64 rows: |v - x|, the room that the box leaves on that side, and eps."""
    offset = v - x
    infinity = torch.full_like(x, torch.inf)
    above = infinity if hi is None else broadcastable(hi, x) - x
    below = infinity if lo is None else x - broadcastable(lo, x)
    room = torch.where(offset > 0, above, below).clamp(min=0)
    radius = broadcastable(eps, v.double()).expand(v.shape[:1] + (1,) * (v.dim() - 1))
    return flatten(offset.abs().double()), flatten(room.double()), flatten(radius)
