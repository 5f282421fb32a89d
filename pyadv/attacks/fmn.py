"""The fast minimum-norm attack (Pintor et al., "Fast Minimum-norm Adversarial Attacks through
Adaptive Norm Constraints", NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks.minimum_norm import NearestIterate, annealed, box_width, reach, rounded
from pyadv.engine import checks
from pyadv.engine.attack import Model, functional
from pyadv.engine.norms import DUAL, distance, row_norm
from pyadv.engine.starts import PROJECT
from pyadv.engine.state import PerRow, Rows
from pyadv.tensors import clip_to_box, per_row, rows, widen

_LAST_ALPHA = 0.01  # as a share of the first
_TINY = 1e-12


class FMN(NearestIterate):
    """The nearest point in any norm, by steps along the margin's gradient in a ball around x that
    adapts.

    Until an iterate fools the model the ball reaches as far as the linearised boundary. Then it
    shrinks by 1 - gamma after each that does, and to the nearest point found, and grows by
    1 + gamma after others. `attack(x, y)` gives the nearest iterate that fools the model, x itself
    where there is none; `attack.run(x, y)` a `MinimumNormResult`. Costs and state as with `DDN`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2", "L1" or "L0" (or inf, 2, 1, 0); L0 counts the entries of x that change.
        steps: number of steps.
        alpha: L2 size of the first step, in units of x; by default the width of the box (1 if lo
            and hi are not both numbers), in Linf, whose balls are wide in L2, ten times that. It
            falls along half a cosine to a hundredth.
        gamma, gamma_final: change of the radius at the first step and after the last, in (0, 1);
            between them it falls as alpha does. In L0 it is at least one entry.
        targeted: y is the class to reach.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: algorithm 1, from x. There the first ball comes to a halt on a boundary that rounding
    does not cross; here it grows by at least 1 + gamma / 2.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: str | float = "Linf",
        steps: int = 100,
        alpha: float | None = None,
        gamma: float = 0.05,
        gamma_final: float = 0.001,
        **settings: Any,
    ):
        checks.share("gamma", gamma)
        checks.share("gamma_final", gamma_final)
        norm = checks.canonical_norm(norm, ("Linf", "L2", "L1", "L0"))
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        usual = 10 * width if norm == "Linf" else width
        super().__init__(
            model,
            norm=norm,
            steps=steps,
            loss="margin",
            alpha=usual if alpha is None else alpha,
            rule=BallRule(gamma, gamma_final),
            **settings,
        )


@dataclass
class BallRule(PerRow):
    gamma: float
    gamma_final: float
    radius: Tensor | None = None
    most: Tensor | None = None  # radius that reaches all of the box
    point: Tensor | None = None  # x_adv, before it is rounded to 16 bits

    def begin(self, r: Rows) -> BallRule:
        s = r.settings
        most = reach(r.x, s.norm, s.lo, s.hi)
        first = torch.full_like(most, 1.0 if s.norm == "L0" else 0.0)
        return replace(self, radius=first, most=most, point=widen(r.x_adv))

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        s, nearest = r.settings, -r.best.loss
        gamma = annealed(self.gamma, self.gamma_final, k, s.steps)
        smaller, larger = self.radius * (1 - gamma), self.radius * (1 + gamma)
        if s.norm == "L0":
            smaller = torch.minimum(smaller.floor(), self.radius - 1).clamp(min=0)
            larger = torch.maximum(larger.floor(), self.radius + 1)
        else:
            slope = row_norm(widen(grad), DUAL[s.norm]).clamp(min=_TINY)
            boundary = distance(r.x_adv, r.x, s.norm) + loss.abs().to(slope.dtype) / slope
            boundary = torch.maximum(boundary, self.radius * (1 + gamma / 2))
            larger = torch.where(nearest.isfinite(), larger, boundary)
        radius = torch.where(r.still, larger, torch.minimum(smaller, nearest))
        self.radius = torch.minimum(radius, self.most)
        return grad

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        s, x = r.settings, widen(r.x)
        alpha = annealed(s.alpha, _LAST_ALPHA * s.alpha, k, s.steps)
        radius = self.radius if s.norm == "L2" else torch.inf
        point = ops.l2_step(self.point, widen(grad), x, alpha, radius, None, None)
        if s.norm == "L0":
            point = x + _largest(point - x, self.radius)
        elif s.norm != "L2":
            point = PROJECT[s.norm](point, x, self.radius, None, None)
        self.point = clip_to_box(point, s.lo, s.hi)
        r.x_adv = rounded(self.point, r.x, s.lo, s.hi)


def _largest(offset: Tensor, count: Tensor) -> Tensor:
    """The `count` (B,) entries of largest magnitude of each row, the others 0."""
    order = rows(offset).abs().argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).view(offset.shape)
    return torch.where(rank < per_row(count, offset), offset, 0.0)


fmn = functional("fmn", FMN)
