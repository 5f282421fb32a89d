"""Steps of attacks, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.reference.hyperplane import boundary_step
from pyadv.reference.projections import l1_box_clip, l2_clip, linf_clip, row_scale
from pyadv.tensors import broadcastable, finish, flatten, movable, per_row, row_norm, widen


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Return min(max(x_adv + alpha sign(grad), x - eps), x + eps), clipped to the box. See
    `ops.linf_step`."""
    a, center = widen(x_adv), widen(x)
    moved = a + _signed(widen(grad), broadcastable(alpha, a))
    return finish(linf_clip(moved, center, eps, lo, hi), x_adv, active)


def l2_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Return x_adv + alpha grad / ||grad||, projected onto the ball, then onto the box. See
    `ops.l2_step`."""
    a, center = widen(x_adv), widen(x)
    moved = a + broadcastable(alpha, a) * _unit(widen(grad))
    return finish(l2_clip(moved, center, eps, lo, hi), x_adv, movable(grad, active))


def l1_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    keep: float | Tensor = 0.2,
) -> Tensor:
    """Move the entries of largest |grad| by alpha sign / count, then apply `l1_project`. See
    `ops.l1_step`."""
    a, g, center = widen(x_adv), widen(grad), widen(x)
    if not a.numel():
        return finish(a, x_adv, active)
    kept = (g.abs() >= _smallest_kept(g, keep)) & (g != 0)
    count = per_row(flatten(kept).sum(1), a)
    moved = a + torch.where(kept, _signed(g, broadcastable(alpha, a) / count), torch.zeros_like(a))
    return finish(l1_box_clip(moved, center, eps, lo, hi), x_adv, movable(grad, active))


def linf_momentum_step(
    x_adv: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Take APGD's step in the Linf ball. See `ops.linf_momentum_step`."""
    a, center = widen(x_adv), widen(x)
    z = linf_clip(a + _signed(widen(grad), broadcastable(alpha, a)), center, eps, lo, hi)
    mixed = _mixed(a, z, widen(x_prev), momentum)
    return finish(linf_clip(mixed, center, eps, lo, hi), x_adv, active)


def l2_momentum_step(
    x_adv: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Take APGD's step in the L2 ball. See `ops.l2_momentum_step`."""
    a, center = widen(x_adv), widen(x)
    z = l2_clip(a + broadcastable(alpha, a) * _unit(widen(grad)), center, eps, lo, hi)
    mixed = _mixed(a, z, widen(x_prev), momentum)
    return finish(l2_clip(mixed, center, eps, lo, hi), x_adv, movable(grad, active))


def linf_boundary_step(
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
    """Take FAB's step in Linf. See `ops.linf_boundary_step`."""
    return boundary_step("Linf", x_adv, grad, x, value, share, overshoot, lo, hi, active)


def l2_boundary_step(
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
    """Take FAB's step in L2. See `ops.l2_boundary_step`."""
    return boundary_step("L2", x_adv, grad, x, value, share, overshoot, lo, hi, active)


def square_step(
    x_adv: Tensor,
    x_best: Tensor,
    x: Tensor,
    u: Tensor,
    side: int,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
) -> Tensor:
    """Return x_best after a `linf_step` of 2 eps in one window of each row. See
    `ops.square_step`."""
    height, width = x.shape[2:]
    top = per_row((u[:, 0] * (height - side + 1)).long().clamp(0, height - side), x)
    left = per_row((u[:, 1] * (width - side + 1)).long().clamp(0, width - side), x)
    i, j = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    inside = (i >= top) & (i < top + side) & (j >= left) & (j < left + side)
    direction = torch.where(u[:, 2:, None, None] >= 0.5, 1.0, -1.0).to(x.dtype).expand(x.shape)
    moved = linf_step(x_best, direction, x, 2 * eps, eps, lo, hi)
    return finish(torch.where(inside, moved, x_best), x_adv, active)


def keep_rows_(mask: Tensor, x: Tensor, grad: Tensor, x_best: Tensor, grad_best: Tensor) -> None:
    """Write x into x_best and grad into grad_best in the rows of the mask. See `ops.keep_rows_`."""
    x_best.copy_(torch.where(per_row(mask, x), x, x_best))
    grad_best.copy_(torch.where(per_row(mask, grad), grad, grad_best))


def keep_best_(
    loss: Tensor,
    x: Tensor,
    grad: Tensor | None,
    loss_best: Tensor,
    x_best: Tensor,
    grad_best: Tensor | None,
) -> None:
    """Write loss, x and grad into the best ones in rows where loss > loss_best. See
    `ops.keep_best_`."""
    better = loss > loss_best
    pairs = [(loss, loss_best), (x, x_best)]
    if grad is not None and grad_best is not None:
        pairs.append((grad, grad_best))
    for new, best in pairs:
        best.copy_(torch.where(per_row(better, new), new, best))


def _signed(g: Tensor, size: Tensor) -> Tensor:
    """Return size sign(g); 0 for NaN."""
    zero = torch.zeros_like(g)
    return torch.where(g > 0, size, torch.where(g < 0, -size, zero))


def _unit(g: Tensor) -> Tensor:
    """Return g / ||g|| for rows of any norm, and 0 for a row of zeros."""
    scaled = g / row_scale(g)
    norm = per_row(row_norm(scaled, 2), g)
    return torch.where(norm > 0, scaled / norm, torch.zeros_like(g))


def _smallest_kept(g: Tensor, keep: float | Tensor) -> Tensor:
    """Return the |g| of rank floor((1 - keep) n) in ascending order, as (B, 1, ...). The rank is
    computed in float32, as in AutoAttack."""
    magnitude = flatten(g).abs()
    n = magnitude.shape[1]
    fraction = torch.as_tensor(keep, dtype=torch.float32, device=g.device).reshape(-1)
    rank = ((1 - fraction) * n).clamp(0, n - 1).long().expand(g.shape[0])
    return per_row(magnitude.sort(1)[0].gather(1, rank[:, None])[:, 0], g)


def _mixed(a: Tensor, z: Tensor, previous: Tensor, momentum: float | Tensor) -> Tensor:
    m = broadcastable(momentum, a)
    return a + m * (z - a) + (1 - m) * (a - previous)
