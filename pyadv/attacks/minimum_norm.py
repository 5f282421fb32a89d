"""What the attacks that look for the nearest point have in common: the linearised
boundaries, and how they end."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyadv.engine.attack import GradientAttack, Model, _show
from pyadv.engine.loop import input_gradient
from pyadv.engine.losses import Loss
from pyadv.engine.norms import DUAL, ORDER, distance, row_norm
from pyadv.engine.results import MinimumNormResult
from pyadv.engine.state import Direction, Parameter, Settings, StepRule
from pyadv.passes.borrow import Output
from pyadv.tensors import clip_to_box, parameter, per_row, widen

_TINY = 1e-12


def boundaries(
    logits: Tensor, leaf: Tensor, y: Tensor, classes: Tensor, norm: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each class c in a column of `classes` (B, m): z_c - z_y (B,), its input gradient at
    `leaf`, and the norm of that (B,) by which z_c - z_y divided is a distance in `norm`. One
    gradient is made at a time, so memory does not grow with the number of classes."""
    values = widen(logits.detach())
    values = values.gather(1, classes) - values.gather(1, y[:, None])
    of_label = torch.zeros_like(logits).scatter_(1, y[:, None], 1.0)
    m = classes.shape[1]
    for j in range(m):
        cotangent = torch.zeros_like(logits).scatter_(1, classes[:, j : j + 1], 1.0) - of_label
        grad = widen(input_gradient(logits, leaf, cotangent, retain_graph=j + 1 < m))
        yield values[:, j], grad, row_norm(grad, DUAL[norm])


def nearest_boundary(
    logits: Tensor, leaf: Tensor, y: Tensor, classes: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    """z_c - z_y (B,) and its input gradient at `leaf`, for the class c of `classes` (B, m) whose
    boundary is nearest if the model is linear."""
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
    """(B, C - 1): all classes but y."""
    k = torch.arange(logits.shape[1] - 1, device=y.device)
    return k + (k >= y[:, None])


def box_width(lo: Parameter | None, hi: Parameter | None) -> float:
    """Return what settings published for the box [0, 1] are multiplied by: hi - lo, or 1 if a bound
    is no finite number."""
    bounded = isinstance(lo, (int, float)) and isinstance(hi, (int, float))
    return float(abs(hi - lo)) if bounded and math.isfinite(hi - lo) else 1.0


def reach(x: Tensor, norm: str, lo: Parameter | None, hi: Parameter | None) -> Tensor:
    """(B,): how far from x the farthest point of the box is; inf without a box."""
    wide = widen(x)
    infinity = torch.full_like(wide, torch.inf)
    above = infinity if hi is None else parameter(hi, wide) - wide
    below = infinity if lo is None else wide - parameter(lo, wide)
    return row_norm(torch.maximum(above, below), ORDER[norm])


def annealed(first: float, last: float, k: int, steps: int) -> float:
    """From `first` at k = 0 along half a cosine to `last` at k = steps."""
    return last + (first - last) * (1 + math.cos(math.pi * k / steps)) / 2


def rounded(point: Tensor, x: Tensor, lo: Parameter | None, hi: Parameter | None) -> Tensor:
    """A point of the box in the dtype of x, still in the box."""
    return point if point.dtype == x.dtype else clip_to_box(point.to(x.dtype), lo, hi)


class MinimumNorm(GradientAttack):
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
        eps: Parameter | None,
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
        within = "" if self.eps is None else f" within {_show(self.eps)}"
        return f"{self.settings.norm}, the nearest point{within}"

    def _search_words(self) -> list[str]:
        return [f"{self.settings.steps} steps"]


class NearestIterate(MinimumNorm):
    """The minimum-norm attacks that the engine runs: of all iterates that fool the model, x and the
    last included, the nearest to x is the result. A sample that is wrong at x leaves at once.

    Args:
        norm, steps, loss, rule, direction, patience: as in `Settings`.
        alpha: size of the first step.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.
        targeted: y is the class to reach.
    """

    def __init__(
        self,
        model: Model | None,
        *,
        norm: str,
        steps: int,
        loss: str,
        rule: StepRule,
        scale: str = "exact",
        confidence: float = 0.0,
        alpha: float = 0.0,
        patience: int | None = None,
        direction: Direction | None = None,
        targeted: bool = False,
        eps: Parameter | None = None,
        lo: Parameter | None = 0.0,
        hi: Parameter | None = 1.0,
        compact: bool | str = "auto",
        output: Output = None,
        validate: bool | str = "auto",
        speed: str = "exact",
    ):
        settings = Settings(
            norm=norm,
            eps=0.0 if eps is None else eps,
            alpha=alpha,
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
            direction=direction,
            speed=speed,
        )
        super().__init__(model, settings, restarts=1, seed=None, eps=eps)
