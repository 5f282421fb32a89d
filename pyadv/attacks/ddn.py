"""Decoupled direction and norm (Rony et al., "Decoupling Direction and Norm for Efficient
Gradient-Based L2 Adversarial Attacks and Defenses", CVPR 2019)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks.minimum_norm import (
    ClassChoice,
    ClassRule,
    NearestIterate,
    annealed,
    box_width,
    class_choice,
    reach,
    rounded,
)
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.state import State
from pyadv.engine.task import Model, memory
from pyadv.tensors import widen

_LAST_ALPHA = 0.01  # a share of the first step size


class DDN(NearestIterate):
    """The nearest point in L2, by steps on a sphere around x, along the gradient of z_c - z_y for a
    class c, or of the cross-entropy (classes="runner-up", as the authors).

    The sphere shrinks by the factor 1 - gamma after an iterate that fools the model, and else grows
    by 1 + gamma. `attack(x, y)` gives the nearest iterate that fools the model, x itself where
    there is none; `attack.run(x, y)` a `MinimumNormResult`. It costs `steps + 1` forward passes and
    `steps` input gradients, of which samples that are wrong at x take one forward pass. The module
    and its state are afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        steps: number of steps.
        gamma: change of the radius at each step, in (0, 1).
        alpha: size of the first step, in units of x; the width of the box by default (1 if lo and
            hi are not both numbers). It falls along half a cosine to a hundredth.
        start_radius: of the sphere, like alpha.
        classes: which wrong class c to descend towards: "nearest", the one whose linearised
            boundary is nearest to x, chosen at x and from 50 steps on again halfway, each time by
            one backward pass per class (at most 9); or "runner-up", whichever class the model ranks
            next to y, as the authors do. With `targeted` there is no choice.
        targeted: y is the class to reach.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: algorithm 1, without its rounding to 256 grey levels (`to_uint8` rounds).
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        steps: int = 100,
        gamma: float = 0.05,
        alpha: float | None = None,
        start_radius: float | None = None,
        classes: ClassChoice = "nearest",
        targeted: bool = False,
        **settings: Any,
    ):
        checks.share("gamma", gamma)
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        radius = width if start_radius is None else start_radius
        checks.size("start_radius", radius, tensor=False)
        alpha = width if alpha is None else alpha
        checks.size("alpha", alpha, tensor=False)
        super().__init__(
            model,
            norm="L2",
            steps=steps,
            loss="ce",
            scale="unit",
            rule=SphereRule(class_choice(classes, targeted), gamma, radius, alpha),
            targeted=targeted,
            **settings,
        )


@dataclass
class SphereRule(ClassRule):
    """The rule of DDN: a step along the gradient, then back to a sphere whose radius adapts."""

    gamma: float
    start_radius: float
    first_alpha: float
    alpha: Tensor = memory()  # the step size of this step
    radius: Tensor = memory()
    most: Tensor = memory()  # (B,) the radius that reaches the whole box
    point: Tensor = memory()  # x_adv, before it is rounded to 16 bits

    def begin(self, state: State) -> SphereRule:
        most = reach(state.x, "L2", state.settings.lo, state.settings.hi)
        return replace(
            self,
            alpha=most.new_zeros(()),
            radius=torch.full_like(most, self.start_radius),
            most=most,
            point=widen(state.x_adv).clone(),
        )

    def schedule(self, state: State, k: int) -> None:
        last = _LAST_ALPHA * self.first_alpha
        self.alpha.fill_(annealed(self.first_alpha, last, k, state.settings.steps))

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        change = torch.where(state.still, 1 + self.gamma, 1 - self.gamma)
        torch.minimum(self.radius * change, self.most, out=self.radius)
        return grad

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x = state.settings, widen(state.x)
        ahead = ops.l2_step(self.point, widen(grad), x, self.alpha, torch.inf, None, None)
        # A step of length `radius` from x along the offset ends on the sphere.
        ops.l2_step(x, ahead - x, x, self.radius, torch.inf, s.lo, s.hi, out=self.point)
        state.x_adv.copy_(rounded(self.point, state.x, s.lo, s.hi))


ddn = functional("ddn", DDN)
