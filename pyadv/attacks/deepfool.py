"""DeepFool (Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool
deep neural networks", CVPR 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import NearestIterate, box_width, nearest_boundary, rounded
from pyadv.engine import checks
from pyadv.engine.attack import Model, functional
from pyadv.engine.losses import ranked_targets
from pyadv.engine.norms import DUAL, row_norm
from pyadv.engine.state import PerRow, Rows
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
            direction=_to_boundary,
            **settings,
        )


@dataclass
class BoundaryRule(PerRow):
    overshoot: float
    least: float  # length of a step
    rivals: int
    classes: Tensor | None = None  # (B, rivals)
    total: Tensor | None = None  # of the steps

    def begin(self, r: Rows) -> BoundaryRule:
        return replace(self, total=torch.zeros_like(widen(r.x)))

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        self.total = self.total + grad
        return grad

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        s = r.settings
        point = widen(r.x) + (1 + self.overshoot) * self.total
        r.x_adv = rounded(clip_to_box(point, s.lo, s.hi), r.x, s.lo, s.hi)


def _to_boundary(r: Rows, logits: Tensor, leaf: Tensor) -> tuple[Tensor, int]:
    rule, s = r.rule, r.settings
    if rule.classes is None:
        rule.classes = ranked_targets(logits.detach(), r.y, rule.rivals).T
    y = r.y.clamp(0, logits.shape[1] - 1)  # where labels are not checked
    value, w = nearest_boundary(logits, leaf, y, rule.classes, s.norm)
    slope = row_norm(w, DUAL[s.norm])
    way = (value.abs() / slope).clamp(min=rule.least)
    unit = w / per_row(slope, w) if s.norm == "L2" else torch.sign(w)
    offset = torch.where(per_row(slope > 0, w), per_row(way, w) * unit, 0.0)
    return offset, rule.classes.shape[1]


deepfool = functional("deepfool", DeepFool)
