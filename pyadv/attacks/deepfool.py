"""DeepFool (Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool
deep neural networks", CVPR 2016)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import NearestIterate, box_width, nearest_boundary, rounded
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.losses import ranked_targets
from pyadv.engine.norms import DUAL, row_norm
from pyadv.engine.rules import StepRule
from pyadv.engine.state import State
from pyadv.engine.task import Model
from pyadv.tensors import clip_to_box, per_row, widen

_LEAST = 1e-4


class DeepFool(NearestIterate):
    """A near point, in a few steps: each goes the shortest way to the nearest of the linearised
    decision boundaries, until the model is fooled.

    `attack(x, y)` gives that point, x itself where there is none; `attack.run(x, y)` a
    `MinimumNormResult`. It costs at most `steps + 1` forward passes and `classes - 1` input
    gradients a step; samples leave when they fool the model. The module and its state are
    afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "L2" or "Linf" (or 2, inf).
        steps: most steps to take.
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
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: str | float = "L2",
        steps: int = 50,
        overshoot: float = 0.02,
        classes: int = 10,
        **settings: Any,
    ):
        checks.size("overshoot", overshoot)
        checks.count("classes", classes, 2)
        if "targeted" in settings:
            raise TypeError("DeepFool has no argument targeted: it takes the nearest boundary")
        width = box_width(settings.get("lo", 0.0), settings.get("hi", 1.0))
        super().__init__(
            model,
            norm=checks.canonical_norm(norm, ("Linf", "L2")),
            steps=steps,
            loss="margin",
            patience=0,
            rule=BoundaryRule(overshoot, _LEAST * width, classes - 1),
            **settings,
        )


@dataclass
class BoundaryRule(StepRule):
    """The rule of DeepFool: the sum of the shortest ways to the nearest boundary, lengthened."""

    overshoot: float
    least: float  # length of a step
    rivals: int
    classes: Tensor | None = None  # (B, rivals)
    total: Tensor | None = None  # of the steps

    def begin(self, state: State) -> BoundaryRule:
        return replace(self, total=torch.zeros_like(widen(state.x)))

    def kind(self, k: int, steps: int) -> str:
        return "plain" if k else "first"

    def direction(self, state: State, logits: Tensor, leaf: Tensor) -> tuple[Tensor, int]:
        """Return the way to the nearest boundary; it takes one backward pass per rival."""
        s = state.settings
        if self.classes is None:
            self.classes = ranked_targets(logits.detach(), state.y, self.rivals).T
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


deepfool = functional("deepfool", DeepFool)
