"""What the attacks that look for the nearest point have in common: what distance means, and how
they end."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyadv.attacks._attack import GradientAttack, Model
from pyadv.attacks._engine import input_gradient
from pyadv.attacks._result import MinimumNormResult
from pyadv.attacks._rows import Parameter, Settings
from pyadv.reference._common import per_row, rows, widen

ORDER = {"Linf": math.inf, "L2": 2, "L1": 1}
_DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}
_TINY = 1e-12


def row_norm(t: Tensor, order: float) -> Tensor:
    """(B,), also for rows without entries."""
    t = rows(t)
    return torch.linalg.vector_norm(t, order, dim=1) if t.shape[1] else t.new_zeros(len(t))


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    return row_norm(widen(x_adv) - widen(x), ORDER[norm])


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
        yield values[:, j], grad, row_norm(grad, _DUAL[norm])


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
