"""The shortest step to a hyperplane inside a box.

In Linf and L2 all coordinates move together, and each stops where the box ends. One number t
determines the step, and Newton's method finds it. In L1 the coordinates of largest slope move
first, and only a few of them have to be sorted.

Source: Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
Attack" (ICML 2020), equation 4 and appendix B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, pad

from pyadv.menus import Norm
from pyadv.reference.projections import row_scale
from pyadv.tensors import (
    broadcastable,
    clip_to_box,
    finish,
    flatten,
    movable,
    per_row,
    row_sum,
    widen,
)

# Smaller slopes, relative to the largest of the row, count as 0: their squares vanish in float32.
_FLAT = 1e-18
_ORDER: dict[Norm, float] = {"Linf": math.inf, "L2": 2, "L1": 1}
_SHORTEST = 1e-8  # lower bound of the two distances in the weights of their points
_UNCHECKED = 8  # Newton steps between two reads of a value from a GPU


def boundary_step(
    norm: Norm,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    value: float | Tensor,
    share: float | Tensor,
    overshoot: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Take FAB's step in any norm. See `ops.linf_boundary_step`."""
    a, center = widen(x_adv), widen(x)
    if not a.numel():
        return finish(a, x_adv, active)
    keep = movable(grad, active)
    w = torch.where(per_row(keep, grad), widen(grad), 0.0)
    scale = row_scale(w)
    w = w / scale
    value = torch.as_tensor(value, dtype=a.dtype, device=a.device).flatten() / scale.flatten()
    points, values = torch.stack([a, center]), torch.stack([value, value])
    values[1] += row_sum((center - a) * w)
    d = offset_to_hyperplane(points, w, values, norm, lo, hi)
    d_rows = d.reshape(2, len(a), -1)
    furthest = d_rows.abs().amax(2, keepdim=True).clamp(min=1.0)  # squares may overflow
    ways = torch.linalg.vector_norm(d_rows / furthest, _ORDER[norm], dim=2) * furthest[..., 0]
    ways = ways.clamp(min=_SHORTEST)
    part = torch.minimum(per_row(ways[0] / ways.sum(0), a), broadcastable(share, a))
    point, point_of_x = points + broadcastable(overshoot, a) * d
    return finish(clip_to_box(point.lerp(point_of_x, part), lo, hi), x_adv, keep)


def offset_to_hyperplane(
    x: Tensor,
    w: Tensor,
    value: Tensor,
    norm: Norm,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> Tensor:
    """Return for each row the d of least norm with <w, d> = -value and lo <= x + d <= hi.

    If the hyperplane does not meet the box, x + d is the point of the box nearest to it.
    Coordinates with w = 0, or with a w 1e18 times smaller than the largest of the row, do not move.

    Args:
        x: (..., B, *shape) points; coordinates outside the box move only towards it.
        w: (B, *shape) finite normals, of any length.
        value: (..., B) values of the linear function at x.
        norm: "Linf", "L2" or "L1".

    Returns:
        d, of the shape of x, in float32 (float64 for float64).
    """
    wide, normal = widen(x), widen(w)
    if not x.numel():
        return torch.zeros_like(wide)
    scale = flatten(normal.abs()).amax(1)
    scale = torch.where(scale > 0, scale, 1.0)
    normal = hardshrink(normal / per_row(scale, w), _FLAT)
    direction = per_row(-torch.sign(value), w) * torch.sign(normal)
    most = torch.finfo(wide.dtype).max  # 0 times an infinite room would be NaN
    above = (broadcastable(most if hi is None else hi, normal) - wide).clamp(max=most)
    below = (broadcastable(-most if lo is None else lo, normal) - wide).clamp(min=-most)
    room = torch.maximum(direction * above, direction * below).clamp(min=0)  # 0 where no direction
    need = (value.abs() / scale)[..., None].clamp(max=most)
    find = _greedy if norm == "L1" else _filling
    length = find(room.reshape(*value.shape, -1), flatten(normal.abs()), need, norm)
    return direction * length.view(wide.shape)


def _filling(room: Tensor, slope: Tensor, need: Tensor, norm: Norm) -> Tensor:
    """Return min(t speed, room) for the t at which the gain, sum slope min(t speed, room), reaches
    `need`; the speed is 1 in Linf, the slope in L2.

    The gain is a concave, piecewise linear function of t, with a knot where a coordinate reaches
    the end of its room. So Newton's steps from 0 never go too far, and they end on the right piece.
    On images three or four steps suffice, because t is smaller than most knots.
    """
    l2 = norm == "L2"
    knot, rate = (room / slope.clamp(min=_FLAT), slope * slope) if l2 else (room, slope)
    length, t = torch.zeros_like(room), torch.zeros_like(need)
    before = torch.full_like(need, torch.inf)
    most = torch.finfo(room.dtype).max  # an infinite t times a slope of 0 would be NaN
    k = 0
    while True:
        # On a CPU, `where` on whole rows would be slower than all the arithmetic here.
        free = (knot - t).sign_().clamp_(min=0)
        speed = free.mul_(rate).sum(-1, keepdim=True)
        unsettled = speed < before
        if (t.is_cpu or k % _UNCHECKED == _UNCHECKED - 1) and not unsettled.any():
            return length
        left = (need - (slope * length).sum(-1, keepdim=True)).clamp(min=0)
        t = (t + torch.where(unsettled & (speed > 0), left / speed, 0.0)).clamp_(max=most)
        length = torch.minimum(t * slope if l2 else t, room)
        before = speed
        k += 1


def _greedy(room: Tensor, slope: Tensor, need: Tensor, norm: Norm) -> Tensor:
    """Return the lengths that move coordinates in the order of their slopes, the largest first,
    each to the end of its room, until `need` is reached.

    A few coordinates are sorted first, and more only if some row needs more.
    """
    n = room.shape[-1]
    slope = slope * torch.sign(room)
    everything = (slope * room).sum(-1, keepdim=True) <= need
    k = min(max(n // 16, 16), n)
    while True:
        steepest, order = slope.topk(k)
        able = room.gather(-1, order)
        reached = (steepest * able).cumsum(-1)
        if k == n or (everything | (reached[..., -1:] >= need)).all():
            break
        k = min(4 * k, n)
    missing = (need - pad(reached[..., :-1], (1, 0))).clamp(min=0)
    part = torch.where(able > 0, torch.minimum(missing / steepest, able), 0.0)
    length = torch.zeros_like(room).scatter_(-1, order, part)
    return torch.where(everything, room, length)
