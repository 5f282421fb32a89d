"""The shortest way to a hyperplane inside a box (Croce and Hein, "Minimally distorted Adversarial
Examples with a Fast Adaptive Boundary Attack", ICML 2020, equation 4 and appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.attacks._rows import Parameter
from pyadv.reference._common import compute_dtype, parameter, rows


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
    room there is. Coordinates with w = 0 do not move.

    Args:
        x: (B, ...) points; what lies outside the box moves only towards it.
        w: (B, ...) finite normals, of any length.
        value: (B,) what the linear function is at x.
        norm: "Linf", "L2" or "L1".

    Returns:
        d, of the shape of x, in float32 (float64 for float64).
    """
    if not x.numel():
        return torch.zeros_like(x, dtype=compute_dtype(x.dtype))
    room = _room(x, w, value, lo, hi)
    slope, need = rows(w.abs().double()), value.abs().double()[:, None]
    scale = slope.amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)  # so that no square of a slope underflows
    length = (_greedy if norm == "L1" else _filling)(room, slope / scale, need / scale, norm)
    sign = -torch.sign(value)[:, None].double() * rows(torch.sign(w).double())
    return (sign * length).reshape(x.shape).to(compute_dtype(x.dtype))


def _room(
    x: Tensor, w: Tensor, value: Tensor, lo: Parameter | None, hi: Parameter | None
) -> Tensor:
    """(B, n): how far each coordinate can go in its useful direction."""
    wide, infinity = x.double(), torch.full_like(x, torch.inf, dtype=torch.float64)
    above = infinity if hi is None else parameter(hi, wide) - wide
    below = infinity if lo is None else wide - parameter(lo, wide)
    direction = rows(torch.sign(w)) * -torch.sign(value)[:, None]
    room = torch.where(direction > 0, rows(above), rows(below)).clamp(min=0)
    return torch.where(direction == 0, 0.0, room)


def _filling(room: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """min(t speed, room) for the t at which the gains, sum slope min(t speed, room), reach `need`;
    the speed is 1 in Linf, the slope in L2.

    The gains as a function of t have a knot where a coordinate comes to the end of its room. The
    knots are sorted, and the linear piece that reaches `need` is solved.
    """
    speed = slope if norm == "L2" else torch.ones_like(slope)
    knots, order = torch.where(room > 0, room / speed, 0.0).sort(1)
    full = torch.where(room > 0, slope * room, 0.0).gather(1, order).cumsum(1)
    before = torch.cat([torch.zeros_like(full[:, :1]), full[:, :-1]], 1)
    rate = (slope * speed).gather(1, order).flip(1).cumsum(1).flip(1)
    at_knot = (before + knots * rate).nan_to_num(nan=torch.inf, posinf=torch.inf)
    reached = (at_knot < need).sum(1, keepdim=True)
    piece = reached.clamp(max=room.shape[1] - 1)
    t = (need - before.gather(1, piece)) / rate.gather(1, piece)
    t = torch.where(reached == room.shape[1], torch.inf, t.nan_to_num(nan=0.0))
    return torch.where(room > 0, torch.minimum(t * speed, room), 0.0)


def _greedy(room: Tensor, slope: Tensor, need: Tensor, norm: str) -> Tensor:
    """The steepest coordinates first, each to the end of its room, until `need` is reached."""
    slope, order = slope.sort(1, descending=True)
    room = room.gather(1, order)
    gain = torch.where(room > 0, slope * room, 0.0).cumsum(1)
    before = torch.cat([torch.zeros_like(gain[:, :1]), gain[:, :-1]], 1)
    wanted = torch.where(room > 0, (need - before).clamp(min=0) / slope, 0.0)
    return torch.empty_like(room).scatter_(1, order, torch.minimum(wanted, room))
