"""Steps of projected-gradient attacks, in plain PyTorch. Functions of `pyadv.ops` of the same name
have the same arguments; the tests hold the kernels against what stands here."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.reference._common import clip_to_box, finish, parameter, widen


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
    """min(max(x_adv + alpha sign(grad), x - eps), x + eps), then the box. See `ops.linf_step`."""
    a, g, center = widen(x_adv), widen(grad), widen(x)
    radius = parameter(eps, a)
    size, zero = parameter(alpha, a), torch.zeros_like(a)
    moved = a + torch.where(g > 0, size, torch.where(g < 0, -size, zero))  # NaN does not move
    in_ball = torch.minimum(torch.maximum(moved, center - radius), center + radius)
    return finish(clip_to_box(in_ball, lo, hi), x_adv, active)
