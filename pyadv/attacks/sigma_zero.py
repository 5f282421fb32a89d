"""The sigma-zero attack (Cinà, Villani, Pintor, Schönherr, Biggio and Pelillo, "sigma-zero:
Gradient-based Optimization of l0-norm Adversarial Examples", ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import NearestIterate, box_width, rounded
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.rules import StepRule
from pyadv.engine.state import State
from pyadv.engine.task import Model, memory
from pyadv.tensors import clip_to_box, flatten, per_row, widen

_BETA1, _BETA2, _ADAM_TINY = 0.9, 0.999, 1e-8
_TINY = 1e-12
_LAST_ALPHA = 0.1  # a share of the first step size


class SigmaZero(NearestIterate):
    """The point with the fewest changed entries, by descent on margin and a smooth count together:

        max(z_y - max_{j != y} z_j, 0) + mean_i d_i^2 / (d_i^2 + sigma),  d = x_adv - x

    by Adam on gradients divided by their largest entry. After each step entries of d below a
    threshold become 0; the threshold rises after an iterate that fools the model and falls after
    others.

    `attack(x, y)` gives the iterate that fools the model with the fewest changed entries, x itself
    where there is none; `attack.run(x, y)` a `MinimumNormResult`, whose distances count entries. It
    costs `steps + 1` forward passes and `steps` input gradients. The module and its state are
    afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        steps: number of steps.
        alpha: Adam's first step size, in units of x; the width of the box by default (1 if lo and
            hi are not both numbers). It falls along half a cosine to a tenth.
        sigma: smoothness of the count, > 0, in squared units of the box's width.
        threshold: the first, in units of the box's width.
        threshold_rate: change of the threshold at each step, as a share of the step size.
        targeted: y is the class to reach.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`; eps counts entries.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: algorithm 1, with the settings of the authors' code.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        steps: int = 1000,
        alpha: float | None = None,
        sigma: float = 1e-3,
        threshold: float = 0.3,
        threshold_rate: float = 0.01,
        **settings: Any,
    ):
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        alpha = width if alpha is None else alpha
        sizes = {"alpha": alpha, "sigma": sigma, "threshold": threshold}
        for name, value in {**sizes, "threshold_rate": threshold_rate}.items():
            checks.size(name, value, tensor=False)
        if not sigma:
            raise ValueError("sigma must be above 0, got 0")
        super().__init__(
            model,
            norm="L0",
            steps=steps,
            loss="margin",
            rule=SparseDescentRule(
                alpha, sigma * width**2, threshold * width, threshold_rate, width
            ),
            **settings,
        )


@dataclass
class SparseDescentRule(StepRule):
    """The rule of sigma-zero: an Adam step, then small entries of x_adv - x become 0."""

    first_alpha: float
    sigma: float
    first_threshold: float
    rate: float
    width: float
    alpha: Tensor = memory()  # the step size of this step
    next_alpha: Tensor = memory()  # the step size that scales the change of the threshold
    seen1: Tensor = memory()  # 1 - beta1^k, 1 - beta2^k
    seen2: Tensor = memory()
    threshold: Tensor = memory()  # (B,)
    offset: Tensor = memory()  # x_adv - x
    mean: Tensor = memory()  # Adam's running means of the gradient and of its square
    square: Tensor = memory()

    def begin(self, state: State) -> SparseDescentRule:
        x = widen(state.x)
        number = x.new_zeros(())
        return replace(
            self,
            alpha=number,
            next_alpha=number.clone(),
            seen1=number.clone(),
            seen2=number.clone(),
            threshold=x.new_full((len(x),), self.first_threshold),
            offset=torch.zeros_like(x),
            mean=torch.zeros_like(x),
            square=torch.zeros_like(x),
        )

    def schedule(self, state: State, k: int) -> None:
        self.alpha.fill_(self._alpha(max(k - 1, 0), state.settings.steps))
        self.next_alpha.fill_(self._alpha(k, state.settings.steps))
        self.seen1.fill_(1 - _BETA1 ** (k + 1))
        self.seen2.fill_(1 - _BETA2 ** (k + 1))

    def _alpha(self, k: int, steps: int) -> float:
        """Return the step size after step k: the authors begin with that of step 0 twice."""
        share = (1 + math.cos(math.pi * k / steps)) / 2
        return self.first_alpha * (_LAST_ALPHA + (1 - _LAST_ALPHA) * share)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x, d = state.settings, widen(state.x), self.offset
        grad = torch.where(per_row(state.still, d), -widen(grad), 0.0)
        n = max(d[:1].numel(), 1)
        grad = grad + 2 * self.sigma * d / (d.square() + self.sigma).square() / n
        size = flatten(grad).abs().amax(1) if d[:1].numel() else grad.new_zeros(len(d))
        grad = grad / per_row(size.clamp(min=_TINY), d)
        grad = torch.where(per_row(size.isfinite(), d), grad, 0.0)
        self.mean.lerp_(grad, 1 - _BETA1)
        self.square.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        move = self.mean / ((self.square / self.seen2).sqrt() + _ADAM_TINY)
        d = clip_to_box(x + d - self.alpha / self.seen1 * move, s.lo, s.hi) - x
        change = self.rate * self.next_alpha
        self.threshold += torch.where(state.still, -change, change)
        self.threshold.clamp_(0, self.width)
        self.offset.copy_(torch.where(d.abs() < per_row(self.threshold, d), 0.0, d))
        point = torch.where(self.offset == 0, x, x + self.offset)
        state.x_adv.copy_(rounded(clip_to_box(point, s.lo, s.hi), state.x, s.lo, s.hi))


sigma_zero = functional("sigma_zero", SigmaZero)
