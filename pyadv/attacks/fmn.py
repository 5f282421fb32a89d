"""The fast minimum-norm attack (Pintor et al., "Fast Minimum-norm Adversarial Attacks through
Adaptive Norm Constraints", NeurIPS 2021)."""

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
from pyadv.engine.norms import DUAL, distance
from pyadv.engine.starts import PROJECT
from pyadv.engine.state import State
from pyadv.engine.task import Model, memory
from pyadv.menus import ANY_NORMS, AnyNorm
from pyadv.tensors import broadcastable, clip_to_box, flatten, largest, row_norm, widen

_FIRST_ALPHA = {"Linf": 10.0, "L2": 3.0, "L1": 1.0, "L0": 10.0}  # multiples of the box width
_LAST_ALPHA = 0.01  # a share of the first step size
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
            and hi are not both numbers) in L1, three times that in L2, and ten times that in Linf
            and L0, where entries move far. It falls along half a cosine to a hundredth.
        gamma, gamma_final: change of the radius at the first step and after the last, in (0, 1);
            between them it falls as alpha does. In L0 it is at least one entry.
        classes: which wrong class c to descend towards: "nearest", the one whose linearised
            boundary is nearest to x, chosen at x and from 50 steps on again halfway, each time by
            one backward pass per class (at most 9); or "runner-up", whichever class the model ranks
            next to y, as the authors do. With `targeted` there is no choice.
        targeted: y is the class to reach.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    The step size in L2 was chosen among 1, 3 and 10 with 20, 100 and 450 steps, on eight small
    networks trained for that purpose, grey and colour (`benchmarks/choose_fmn.py`): 1 and 3 end
    within 0.1 % of each other, 10 loses 4 % with 20 steps. In Linf 3, 10, 30 and 100 end within
    0.3 % of each other on the six grey networks, and gamma 0.02 to 0.1 within 0.4 %.

    Source: algorithm 1, from x. There the first ball comes to a halt on a boundary that rounding
    does not cross; here it grows by at least 1 + gamma / 2. In L0 there the ball grows from one
    entry, by one entry at most steps, and a step spreads its length over all entries before most of
    them are dropped, so large images are hardly fooled; here the first ball reaches the linearised
    boundary in L0 too, and the step has its length within the entries that are kept.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: AnyNorm | float = "Linf",
        steps: int = 100,
        alpha: float | None = None,
        gamma: float = 0.05,
        gamma_final: float = 0.001,
        classes: ClassChoice = "nearest",
        targeted: bool = False,
        **settings: Any,
    ):
        checks.share("gamma", gamma)
        checks.share("gamma_final", gamma_final)
        norm = checks.canonical_norm(norm, ANY_NORMS)
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        alpha = _FIRST_ALPHA[norm] * width if alpha is None else alpha
        checks.size("alpha", alpha, tensor=False)
        super().__init__(
            model,
            norm=norm,
            steps=steps,
            loss="margin",
            rule=BallRule(class_choice(classes, targeted), gamma, gamma_final, alpha),
            targeted=targeted,
            **settings,
        )


@dataclass
class BallRule(ClassRule):
    """The rule of FMN: a step along the gradient, then back into a ball whose radius adapts."""

    first_gamma: float
    last_gamma: float
    first_alpha: float
    alpha: Tensor = memory()  # the step size of this step
    gamma: Tensor = memory()
    radius: Tensor = memory()
    most: Tensor = memory()  # (B,) the radius that reaches the whole box
    point: Tensor = memory()  # x_adv, before it is rounded to 16 bits

    def begin(self, state: State) -> BallRule:
        s = state.settings
        most = reach(state.x, s.norm, s.lo, s.hi)
        return replace(
            self,
            alpha=most.new_zeros(()),
            gamma=most.new_zeros(()),
            radius=torch.full_like(most, 1.0 if s.norm == "L0" else 0.0),
            most=most,
            point=widen(state.x_adv).clone(),
        )

    def schedule(self, state: State, k: int) -> None:
        steps = state.settings.steps
        last = _LAST_ALPHA * self.first_alpha
        self.alpha.fill_(annealed(self.first_alpha, last, k, steps))
        self.gamma.fill_(annealed(self.first_gamma, self.last_gamma, k, steps))

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        s, nearest = state.settings, -state.best.loss
        smaller, larger = self.radius * (1 - self.gamma), self.radius * (1 + self.gamma)
        missing = self.margin(loss).abs().to(self.radius.dtype)
        if s.norm == "L0":
            smaller = torch.minimum(smaller.floor(), self.radius - 1).clamp(min=0)
            larger = torch.maximum(larger.floor(), self.radius + 1)
            way = _entries_to_boundary(state, widen(grad), missing)
        else:
            slope = row_norm(widen(grad), DUAL[s.norm]).clamp(min=_TINY)
            way = missing / slope
        boundary = distance(state.x_adv, state.x, s.norm) + way
        least = larger if s.norm == "L0" else self.radius * (1 + self.gamma / 2)
        larger = torch.where(nearest.isfinite(), larger, torch.maximum(boundary, least))
        radius = torch.where(state.still, larger, torch.minimum(smaller, nearest))
        torch.minimum(radius, self.most, out=self.radius)
        return grad

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x = state.settings, widen(state.x)
        radius = self.radius if s.norm == "L2" else torch.inf
        grad = widen(grad)
        point = ops.l2_step(self.point, grad, x, self.alpha, radius, None, None)
        if s.norm == "L0":  # scales the step after the entries to keep are chosen
            kept = largest(point - x, self.radius)
            inside = torch.where(kept, self.point, x)
            point = ops.l2_step(inside, grad * kept, x, self.alpha, radius, None, None)
        elif s.norm != "L2":
            point = PROJECT[s.norm](point, x, self.radius, None, None)
        self.point.copy_(clip_to_box(point, s.lo, s.hi))
        state.x_adv.copy_(rounded(self.point, state.x, s.lo, s.hi))


def _entries_to_boundary(state: State, grad: Tensor, missing: Tensor) -> Tensor:
    """Return (B,): the number of entries that must move to the border of the box until a linear
    model with this gradient gains `missing`, or of all entries if they do not suffice."""
    s, x_adv = state.settings, widen(state.x_adv)
    up = torch.inf if s.hi is None else broadcastable(s.hi, x_adv) - x_adv
    down = torch.inf if s.lo is None else x_adv - broadcastable(s.lo, x_adv)
    room = torch.where(grad > 0, up, down)
    gains = flatten(torch.where(grad == 0, 0.0, grad.abs() * room)).sort(1, descending=True).values
    short = gains.cumsum(1) < missing[:, None]
    return (short.sum(1) + 1).clamp(max=gains.shape[1]).to(missing.dtype)


fmn = functional("fmn", FMN)
