"""The shortest way to a hyperplane inside a box (Croce and Hein, "Minimally distorted Adversarial
Examples with a Fast Adaptive Boundary Attack", ICML 2020, equation 4 and appendix B).

In Linf and L2 all coordinates set out together and stop where the box ends: the way is given by one
number t, found by Newton's method. In L1 the steepest coordinates go first. Nothing is sorted but
those few.
"""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyadv.attacks._rows import Parameter
from pyadv.reference._common import parameter, per_row, rows, widen

_FLAT = 1e-18  # of the steepest slope; in float32 the squares of flatter ones vanish
_UNCHECKED = 8  # Newton steps between two looks at a GPU


def offset_to_hyperplane(
    x: Tensor,
    w: Tensor,
    value: Tensor,
    norm: str,
    lo: Parameter | None,
    hi: Parameter | None,
) -> Tensor:
    """For each row the d of least norm with <w, d> = -value and lo <= x + d <= hi.

    Where the box does not reach the hyperplane, d goes to the box's point nearest to it: all of the
    room there is. Coordinates with w = 0 do not move, nor those where it is 1e18 times smaller than
    elsewhere in the row.

    Args:
        x: (..., B, *shape) points; what lies outside the box moves only towards it.
        w: (B, *shape) finite normals, of any length.
        value: (..., B) what the linear function is at x.
        norm: "Linf", "L2" or "L1".

    Returns:
        d, of the shape of x, in float32 (float64 for float64).
    """
    wide, normal = widen(x), widen(w)
    if not x.numel():
        return torch.zeros_like(wide)
    scale = rows(normal.abs()).amax(1)
    scale = torch.where(scale > 0, scale, 1.0)
    normal = normal / per_row(scale, w)
    normal = torch.where(normal.abs() < _FLAT, 0.0, normal)
    direction = per_row(-torch.sign(value), w) * torch.sign(normal)
    room = _room(wide, normal, direction, lo, hi)
    find = _greedy if norm == "L1" else _filling
    need = value.abs() / scale
    room = room.reshape(*value.shape, -1)
    length = find(room, rows(normal.abs()), need[..., None], norm)
    return direction * length.view(wide.shape)


def _room(
    x: Tensor, normal: Tensor, direction: Tensor, lo: Parameter | None, hi: Parameter | None
) -> Tensor:
    """How far each coordinate can go in its useful direction."""
    infinite = x.new_full((), torch.inf)
    above = infinite if hi is None else parameter(hi, normal) - x
    below = infinite if lo is None else x - parameter(lo, normal)
    room = torch.where(direction > 0, above, below).clamp_(min=0)
    return torch.where(direction == 0, 0.0, room)


def _filling(room: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """min(t speed, room) for the t at which the gains, sum slope min(t speed, room), reach `need`;
    the speed is 1 in Linf, the slope in L2.

    The gains are a concave, piecewise linear function of t, with a knot where a coordinate comes
    to the end of its room. So Newton's steps from 0 never go too far, and end on the right piece:
    after three or four of them on images, whose t is small against most knots.
    """
    knot, rate = (room / slope, slope * slope) if norm == "L2" else (room, slope)
    gain = slope * room
    t = torch.zeros_like(need)
    for k in count():
        free = knot > t
        left = need - torch.where(free, 0.0, gain).sum(-1, keepdim=True)
        speed = torch.where(free, rate, 0.0).sum(-1, keepdim=True)
        further = torch.where(speed > 0, left / speed, torch.inf)  # inf: all of the room
        if (t.is_cpu or k % _UNCHECKED == 0) and not (further > t).any():
            break
        t = torch.maximum(t, further)
    return torch.where(free, t * slope if norm == "L2" else t, room)


def _greedy(room: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """The steepest coordinates first, each to the end of its room, until `need` is reached: a few
    are looked at, and more only if some row needs more."""
    n = room.shape[-1]
    slope = torch.where(room > 0, slope, 0.0)
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
