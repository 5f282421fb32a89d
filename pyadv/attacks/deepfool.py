"""DeepFool (Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool
deep neural networks", CVPR 2016)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import (
    Gradient,
    NearestIterate,
    box_width,
    nearest_boundary,
    rounded,
)
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.loop import input_gradient, predict
from pyadv.engine.losses import ranked_targets
from pyadv.engine.norms import DUAL
from pyadv.engine.results import Perturbed
from pyadv.engine.rules import StepRule, kept
from pyadv.engine.state import State
from pyadv.engine.task import Model, Task, memory
from pyadv.passes.borrow import owned
from pyadv.tensors import clip_to_box, flatten, per_row, row_norm, row_sum, widen

BoundaryNorm: TypeAlias = Literal["Linf", "L2"]
NORMS: tuple[BoundaryNorm, ...] = get_args(BoundaryNorm)
Variant: TypeAlias = Literal["plain", "super"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_LEAST = 1e-4
_SMALL = 1e-6
_BISECTIONS = 10


class DeepFool(NearestIterate):
    """A near point, in a few steps: each goes the shortest way to the nearest of the linearised
    decision boundaries, until the model is fooled.

    `attack(x, y)` gives that point, x itself where there is none; `attack.run(x, y)` a
    `MinimumNormResult`. It costs at most `steps + 1` forward passes and `classes - 1` input
    gradients a step; samples leave when they are done. The module and its state are afterwards as
    they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "L2" or "Linf" (or 2, inf).
        variant: "plain", or in L2 "super": from the point where DeepFool fools the model, the part
            of the way along the boundary's normal is kept and DeepFool starts again there, until
            that part alone fools the model; a bisection between x and the point ends it. Nearer
            points, for several times the passes.
        steps: most steps to take; 50 by default, 200 for "super".
        overshoot: the sum of all steps is lengthened by this share, so that points come to lie
            beyond the boundary and not on it; >= 0.
        classes: how many classes to look at, those that the model ranks highest at x, y included;
            with fewer, all.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: algorithm 2, and for Linf section 3.3. As in the authors' code the model is asked at the
    lengthened points, so the result is one it has seen; points are clipped to the box. Their code
    adds 1e-4 to the length of a step, which here is the least length (times the box's width).
    "super" is Abdolahpourrostam, Abroshan and Moosavi-Dezfooli, "Revisiting DeepFool:
    Generalization and Improvement" (2023), algorithm 1, SDF(infinity, 1), where each of DeepFool's
    own steps is lengthened.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: BoundaryNorm | float = "L2",
        variant: Variant = "plain",
        steps: int | None = None,
        overshoot: float = 0.02,
        classes: int = 10,
        **settings: Any,
    ):
        norm = checks.canonical_norm(norm, NORMS)
        checks.choice("variant", variant, VARIANTS)
        checks.size("overshoot", overshoot, tensor=False)
        checks.count("classes", classes, 2)
        if variant == "super" and norm != "L2":
            raise ValueError(f'variant="super" is an attack in L2, got norm={norm}')
        if "targeted" in settings:
            raise TypeError("DeepFool has no argument targeted: it takes the nearest boundary")
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        rule = BoundaryRule if variant == "plain" else NormalRule
        if steps is None:
            steps = 50 if variant == "plain" else 200
        self.variant = variant
        super().__init__(
            model,
            norm=norm,
            steps=steps,
            loss="margin",
            patience=0 if variant == "plain" else None,
            rule=rule(overshoot, _LEAST * width, classes - 1),
            **settings,
        )

    def _search(self, task: Task) -> Perturbed:
        found = super()._search(task)
        return found if self.variant == "plain" else self._bisect(task, found)

    def _bisect(self, task: Task, found: Perturbed) -> Perturbed:
        """Move each point found towards x, as near as it still fools the model."""
        moved = flatten(found.x_adv != task.x).any(1).nonzero()[:, 0]
        if not len(moved):
            return found
        task, best = task.select(moved), found.x_adv[moved]
        s, x, far = task.settings, widen(owned(task.x)), widen(best)
        low, high = x.new_zeros(len(x)), x.new_ones(len(x))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            point = rounded(x.lerp(far, per_row(middle, x)), task.x, s.lo, s.hi)
            logits = predict(task.model, point, s)
            still = s.loss.at(logits, owned(task.y), None)[2]
            low, high = torch.where(still, middle, low), torch.where(still, high, middle)
            best = torch.where(per_row(still, x), best, point)
        found.x_adv[moved] = best
        found.queries[moved] += _BISECTIONS
        return found


@dataclass
class BoundaryRule(StepRule):
    """The rule of DeepFool: the sum of the shortest ways to the nearest boundary, lengthened."""

    overshoot: float
    least: float  # length of a step
    rivals: int
    classes: Tensor = memory()  # (B, rivals)
    total: Tensor = memory()  # of the steps

    def begin(self, state: State) -> BoundaryRule:
        return replace(self, total=torch.zeros_like(widen(state.x)))

    def kind(self, k: int, steps: int) -> str:
        return "plain" if k else "first"

    def direction(
        self, state: State, kind: Hashable, logits: Tensor, leaf: Tensor, gradient: Gradient
    ) -> tuple[Tensor, int]:
        """Return the way to the nearest boundary; it takes one backward pass per rival."""
        s = state.settings
        if kind == "first":
            self.classes = kept(
                self.classes, ranked_targets(logits.detach(), state.y, self.rivals).T
            )
        y = state.y.clamp(0, logits.shape[1] - 1)  # where labels are not checked
        value, w = nearest_boundary(logits, leaf, y, self.classes, s.norm)
        slope = row_norm(w, DUAL[s.norm])
        way = (value.abs() / slope).clamp(min=self.least)
        unit = w / per_row(slope, w) if s.norm == "L2" else torch.sign(w)
        offset = torch.where(per_row(slope > 0, w), per_row(way, w) * unit, 0.0)
        return offset, self.classes.shape[1]

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s = state.settings
        self.total += grad
        point = widen(state.x) + (1 + self.overshoot) * self.total
        state.x_adv.copy_(rounded(clip_to_box(point, s.lo, s.hi), state.x, s.lo, s.hi))


@dataclass
class NormalRule(BoundaryRule):
    """The rule of "super" DeepFool. A sample is `inside` a run of DeepFool that began at `outer`,
    or at `outer` itself; it leaves when it fools the model there."""

    outer: Tensor = memory()
    inside: Tensor = memory()  # (B,) bool
    point: Tensor = memory()  # x_adv, before it is rounded to 16 bits

    def begin(self, state: State) -> NormalRule:
        x_adv, inside = widen(state.x_adv), torch.zeros_like(state.active)
        return replace(self, outer=x_adv.clone(), point=x_adv.clone(), inside=inside)

    def direction(
        self, state: State, kind: Hashable, logits: Tensor, leaf: Tensor, gradient: Gradient
    ) -> tuple[Tensor, int]:
        """Return the way to the next point: for samples that fool the model inside a run, to the
        next outer point; for the others DeepFool's."""
        z = logits.detach()
        y = state.y.clamp(0, z.shape[1] - 1)
        towards = torch.zeros_like(z).scatter_(1, z.argmax(1)[:, None], 1.0)
        towards.scatter_add_(1, y[:, None], -torch.ones_like(towards[:, :1]))
        normal = widen(input_gradient(logits, leaf, towards, retain_graph=True))
        length = row_norm(normal, 2).clamp(min=_SMALL)
        normal = normal / per_row(length, normal)
        along = row_sum((self.point - widen(state.x)) * normal)
        way, passes = super().direction(state, kind, logits, leaf, gradient)
        outer = self.outer + per_row(along, normal) * normal - self.point
        ended = per_row(self.inside & ~state.still, way)
        return torch.where(ended, outer, (1 + self.overshoot) * way), passes + 1

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        state.active &= state.still | self.inside  # an outer point that fools the model is the end
        self.inside.copy_(torch.where(self.inside, state.still, True))
        return grad

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s = state.settings
        self.point.copy_(clip_to_box(self.point + grad, s.lo, s.hi))
        inside = per_row(self.inside, self.point)
        self.outer.copy_(torch.where(inside, self.outer, self.point))
        state.x_adv.copy_(rounded(self.point, state.x, s.lo, s.hi))


deepfool = functional("deepfool", DeepFool)
