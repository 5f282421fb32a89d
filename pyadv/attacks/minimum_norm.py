"""The base of the attacks that look for the nearest point that fools the model: linearised decision
boundaries, the choice of a class to follow, and results with distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.engine.attack import Attack, show
from pyadv.engine.loop import input_gradient
from pyadv.engine.losses import Loss, ranked_targets
from pyadv.engine.norms import DUAL, ORDER, distance
from pyadv.engine.results import MinimumNormResult
from pyadv.engine.rules import StepRule, kept
from pyadv.engine.state import State
from pyadv.engine.task import FloatOrTensor, LoopSettings, Model, Settings, memory
from pyadv.menus import AnyNorm, Auto, LossName, Scale, Speed
from pyadv.passes.borrow import Output
from pyadv.tensors import broadcastable, clip_to_box, per_row, row_norm, row_sum, widen

_TINY = 1e-12
_RIVALS = 9  # classes that are compared when one to follow is chosen
_TWICE = 50  # steps from which on the choice is made again halfway

Gradient = Callable[[], tuple[Tensor, int]]  # of the loss, with its number of backward passes
ClassChoice: TypeAlias = Literal["nearest", "runner-up"]
CLASSES: tuple[ClassChoice, ...] = get_args(ClassChoice)


def boundaries(
    logits: Tensor, leaf: Tensor, y: Tensor, classes: Tensor, norm: AnyNorm
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for the class c in each column of `classes` (B, m): z_c - z_y (B,), its input gradient
    at `leaf`, and the norm of the gradient (B,) that turns z_c - z_y into a distance in `norm`. One
    gradient exists at a time, so memory does not grow with the number of classes."""
    values = widen(logits.detach())
    values = values.gather(1, classes) - values.gather(1, y[:, None])
    of_label = torch.zeros_like(logits).scatter_(1, y[:, None], 1.0)
    m = classes.shape[1]
    for j in range(m):
        cotangent = torch.zeros_like(logits).scatter_(1, classes[:, j : j + 1], 1.0) - of_label
        grad = widen(input_gradient(logits, leaf, cotangent, retain_graph=j + 1 < m))
        yield values[:, j], grad, row_norm(grad, DUAL[norm])


def nearest_boundary(
    logits: Tensor, leaf: Tensor, y: Tensor, classes: Tensor, norm: AnyNorm
) -> tuple[Tensor, Tensor]:
    """Return z_c - z_y (B,) and its input gradient at `leaf`, for the class c of `classes` (B, m)
    whose linearised boundary is nearest."""
    value = torch.zeros_like(widen(logits.detach())[:, 0])
    best, w = torch.full_like(value, torch.inf), torch.zeros_like(widen(leaf.detach()))
    for difference, grad, slope in boundaries(logits, leaf, y, classes, norm):
        way = difference.abs() / (_TINY + slope)
        nearer = (way < best) & slope.isfinite()  # others give no hyperplane
        best = torch.where(nearer, way, best)
        value = torch.where(nearer, difference, value)
        w = torch.where(per_row(nearer, w), grad, w)
    return value.to(w.dtype), w


def other_classes(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B, C - 1): all classes but y."""
    k = torch.arange(logits.shape[1] - 1, device=y.device)
    return k + (k >= y[:, None])


def box_width(lo: FloatOrTensor | None, hi: FloatOrTensor | None) -> float:
    """Return the factor for settings that were published for the box [0, 1]: hi - lo, or 1 if a
    bound is no finite number."""
    if isinstance(lo, (int, float)) and isinstance(hi, (int, float)) and math.isfinite(hi - lo):
        return float(abs(hi - lo))
    return 1.0


def reach(x: Tensor, norm: AnyNorm, lo: FloatOrTensor | None, hi: FloatOrTensor | None) -> Tensor:
    """Return (B,): how far from x the farthest point of the box is; inf without a box."""
    wide = widen(x)
    infinity = torch.full_like(wide, torch.inf)
    above = infinity if hi is None else broadcastable(hi, wide) - wide
    below = infinity if lo is None else wide - broadcastable(lo, wide)
    return row_norm(torch.maximum(above, below), ORDER[norm])


def annealed(first: float, last: float, k: int, steps: int) -> float:
    """Return the value at step k of half a cosine from `first` at 0 to `last` at `steps`."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2


def rounded(point: Tensor, x: Tensor, lo: FloatOrTensor | None, hi: FloatOrTensor | None) -> Tensor:
    """Return a point of the box in the dtype of x, still in the box."""
    return point if point.dtype == x.dtype else clip_to_box(point.to(x.dtype), lo, hi)


@dataclass
class ClassRule(StepRule):
    """The base of rules that follow one class c per sample: they ascend z_c - z_y. With
    classes="runner-up" they ascend the loss instead, which sees whichever class is next to y.

    With "nearest", c is the class whose boundary, linearised at the iterate, is nearest to x. It is
    chosen at x, and in long attacks again halfway. A sample that another class has fooled at the
    nearest point so far follows that class from there.
    """

    classes: ClassChoice
    _: KW_ONLY
    follow: Tensor = memory()  # (B,) the classes
    value: Tensor = memory()  # (B,) z_c - z_y at the current iterate
    best: Tensor = memory()  # (B,) minus the smallest distance before this iterate

    def kind(self, k: int, steps: int) -> str:
        if self.classes == "nearest" and (k == 0 or (steps >= _TWICE and k == steps // 2)):
            return "choose"
        return "plain"

    def direction(
        self, state: State, kind: Hashable, logits: Tensor, leaf: Tensor, gradient: Gradient
    ) -> tuple[Tensor, int]:
        """Return the gradient of z_c - z_y."""
        if self.classes == "runner-up":
            return gradient()
        z, best = logits.detach(), state.best.loss
        y = state.y.clamp(0, z.shape[1] - 1)  # where labels are not checked
        if kind == "choose":
            grad, passes = self._choose(state, logits, leaf, y)
        else:
            fooled_nearest = ~state.still & (best > self.best)
            follow = torch.where(fooled_nearest, z.argmax(1), self.follow)
            self.follow.copy_(torch.where(follow == y, self.follow, follow))
            cotangent = torch.zeros_like(z).scatter_(1, self.follow[:, None], 1.0)
            cotangent.scatter_(1, y[:, None], -1.0)
            grad, passes = input_gradient(logits, leaf, cotangent), 1
        wide = widen(z)
        value = wide.gather(1, self.follow[:, None]) - wide.gather(1, y[:, None])
        self.value, self.best = kept(self.value, value[:, 0]), kept(self.best, best)
        return grad, passes

    def margin(self, loss: Tensor) -> Tensor:
        """Return the margin (B,) to the class that is followed; `loss` is that to the runner-up."""
        return loss if self.classes == "runner-up" else self.value.to(loss.dtype)

    def _choose(self, state: State, logits: Tensor, leaf: Tensor, y: Tensor) -> tuple[Tensor, int]:
        classes = ranked_targets(logits.detach(), y, _RIVALS).T
        norm: AnyNorm = "L1" if state.settings.norm == "L0" else state.settings.norm
        offset = widen(state.x) - widen(leaf.detach())
        nearest = torch.full_like(widen(logits.detach())[:, 0], torch.inf)
        follow, w = classes[:, 0].clone(), torch.zeros_like(offset)
        for j, (margin, grad, slope) in enumerate(boundaries(logits, leaf, y, classes, norm)):
            at_x = margin + row_sum(grad * offset)
            way = (-at_x).clamp(min=0) / (_TINY + slope)
            nearer = (way < nearest) & slope.isfinite()
            nearest = torch.where(nearer, way, nearest)
            w = torch.where(per_row(nearer | (j == 0), w), grad, w)
            follow = torch.where(nearer, classes[:, j], follow)
        self.follow = kept(self.follow, follow)
        return w.to(leaf.dtype), classes.shape[1]


def class_choice(classes: ClassChoice, targeted: bool) -> ClassChoice:
    """Return the setting `classes` of a `ClassRule`; a targeted attack has no choice."""
    checks.choice("classes", classes, CLASSES)
    return "runner-up" if targeted else classes


class MinimumNorm(Attack):
    """The base of the attacks that ask how near the nearest point is that fools the model.

    `attack(x, y)` gives the nearest point found, x itself where there is none or where x fools the
    model already.

    Args:
        eps: radius within which a point counts as a success in `run`; float or per sample (B,);
            None for any.
    """

    def __init__(
        self,
        model: Model | None,
        settings: Settings,
        restarts: int,
        seed: int | None,
        eps: FloatOrTensor | None,
    ):
        if isinstance(eps, Tensor) and eps.dim() > 1:
            raise ValueError(
                f"eps must be one radius or one per sample (B,), got shape {list(eps.shape)}"
            )
        super().__init__(model, settings, restarts, seed)
        self.eps = eps

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> MinimumNormResult:
        """The attack and how it ended. Arguments as in `PGD.run`. With an eps, `correct` also
        holds for samples whose nearest point found lies farther away."""
        result = super().run(x, y, ids, draw, model)
        distances = distance(result.x_adv, x, self.settings.norm)
        distances = torch.where(result.correct, torch.inf, distances)
        if self.eps is not None:
            eps = torch.as_tensor(self.eps, dtype=distances.dtype, device=distances.device)
            result.correct |= distances > eps
        return MinimumNormResult(**vars(result), distances=distances)

    def _ball_words(self) -> str:
        within = "" if self.eps is None else f" within {show(self.eps)}"
        return f"{self.settings.norm}, the nearest point{within}"

    def _search_words(self) -> list[str]:
        return [f"{self.settings.steps} steps"]


class NearestIterate(MinimumNorm):
    """The minimum-norm attacks that the engine runs: of all iterates that fool the model, x and the
    last included, the nearest to x is the result. A sample that is wrong at x leaves at once.

    Args:
        norm, steps, loss, rule, patience: as in `LoopSettings`.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.
        targeted: y is the class to reach.
    """

    settings: LoopSettings

    def __init__(
        self,
        model: Model | None,
        *,
        norm: AnyNorm,
        steps: int,
        loss: LossName,
        rule: StepRule,
        scale: Scale = "exact",
        confidence: float = 0.0,
        patience: int | None = None,
        targeted: bool = False,
        eps: FloatOrTensor | None = None,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        compact: Auto = "auto",
        output: Output = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
    ):
        settings = LoopSettings(
            norm=norm,
            eps=0.0 if eps is None else eps,
            steps=steps,
            loss=Loss(loss, targeted, "fused", scale, confidence),
            start="none",
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            rule=rule,
            patience=steps if patience is None else patience,
            best="nearest",
            speed=speed,
        )
        super().__init__(model, settings, restarts=1, seed=None, eps=eps)
