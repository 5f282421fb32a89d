"""The smallest radius at which an attack of fixed radius succeeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks import PGD, MinimumNormResult, TargetedAPGD
from pyadv.engine import checks
from pyadv.engine.attack import Attack, Model
from pyadv.engine.norms import ORDER, distance
from pyadv.engine.task import FloatOrTensor
from pyadv.evaluation.normalized_margins import effective_margin
from pyadv.menus import Norm
from pyadv.passes.borrow import Output, owned
from pyadv.tensors import broadcastable, row_norm, widen

_LEAST = 1e-4  # least first radius, as a share of the radius that holds the whole box


class Place(TypedDict):
    """Arguments that all searches have."""

    lo: FloatOrTensor | None
    hi: FloatOrTensor | None
    output: Output


class Bisection:
    """A search for the smallest radius at which an attack fools the model, per sample.

    The first radius is the sample's effective margin. It doubles until the attack succeeds; then
    the search halves the bracket between the largest radius that failed and the smallest distance
    of a point that fooled the model. All samples are attacked as one batch, each with its own
    radius. The point is kept, so the distance found is an upper bound of the true one. Smaller
    radii that failed prove nothing.

    `run(x, y)` returns a `MinimumNormResult`, as the minimum-norm attacks do: `distances` is 0
    where x is not classified as y, and inf where the attack failed at every radius up to the one
    that holds the whole box.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2" or "L1".
        attack: makes the attack for radii (B,), in the same norm and box; by default 20 steps of
            APGD towards each of 3 classes, whose loss does not change with the scale of the logits.
        rounds: largest number of rounds, >= 1. Each round after the first success halves the
            bracket.
        lo, hi: bounds of the box that inputs lie in; None for no bound; float, or tensor that
            broadcasts to x.
        seed: seed of the default attack's keyed noise; torch.initial_seed() by default.
        output: as in `PGD`.

    Raises:
        ValueError, TypeError: for settings; at the call for arguments that `attack` refuses.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: Norm | float = "Linf",
        attack: Callable[[Tensor], Attack] | None = None,
        rounds: int = 10,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        seed: int | None = None,
        output: Output = None,
    ):
        self.model, self.output = model, output
        self.norm = checks.canonical_norm(norm)
        self.rounds = checks.count("rounds", rounds, 1)
        self.lo, self.hi = lo, hi
        place: Place = {"lo": lo, "hi": hi, "output": output}
        canonical = self.norm
        self.clean = PGD(norm=canonical, eps=0.0, steps=0, start="none", loss="margin", **place)
        self.attack = attack or (
            lambda eps: TargetedAPGD(
                norm=canonical, eps=eps, steps=20, targets=3, seed=seed, **place
            )
        )
        self.draw = 0

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the nearest points found; x itself where none was found."""
        return self.run(x, y, ids).x_adv

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> MinimumNormResult:
        """Search, and return how it ended. Arguments as in `PGD.run`."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError("attack: no model; give one at construction or as model=")
        if draw is None:
            draw = self.draw
            self.draw += 1
        x, y = owned(x), owned(y)
        clean = self.clean.run(x, y, model=model)  # checks x and y
        found = MinimumNormResult(**vars(clean), distances=torch.where(clean.correct, torch.inf, 0))
        ids = ops.row_hash(x) if ids is None else ids
        right, most = found.correct.clone(), self._radius_of_the_box(x)
        eps = effective_margin(model, x, y, norm=self.norm, output=self.output)
        found.queries += 1
        found.gradients += found.logits.shape[1] - 1
        eps = torch.minimum(eps, most)
        eps = torch.where(eps.isfinite(), eps, 1.0)  # a flat model without a box has no scale
        eps = torch.maximum(eps, _LEAST * torch.where(most.isfinite(), most, 1.0))
        failed, nearest = torch.zeros_like(eps), torch.full_like(eps, torch.inf)
        for _ in range(self.rounds):
            rows = (right & (failed < most)).nonzero()[:, 0]
            if not len(rows):
                break
            result = self.attack(eps[rows]).run(x[rows], y[rows], ids[rows], draw, model)
            length = distance(result.x_adv, x[rows], self.norm)
            nearer = ~result.correct & (length < nearest[rows])
            hits = rows[nearer]
            nearest[hits] = length[nearer]
            failed[rows] = torch.where(result.correct, eps[rows], failed[rows])
            failed = torch.where(failed < nearest, failed, 0.0)  # a larger radius failed, by chance
            eps = torch.where(
                nearest.isfinite(), (failed + nearest) / 2, torch.minimum(2 * eps, most)
            )
            for name in ("x_adv", "logits", "correct", "loss"):
                getattr(found, name)[hits] = getattr(result, name)[nearer]
            for name in ("kappa", "steps", "queries", "gradients"):
                getattr(found, name)[rows] += getattr(result, name)
        found.distances = torch.where(right, nearest, 0.0)
        return found

    def describe(self) -> str:
        """Return one line that lets a reader repeat the search."""
        return (
            f"{self.attack(torch.ones(1, device='cpu')).describe()}, chosen in {self.rounds} rounds"
        )

    def _radius_of_the_box(self, x: Tensor) -> Tensor:
        """Return (B,) distances from x to the farthest corner of the box; inf without a box."""
        wide = widen(x)
        if self.lo is None or self.hi is None:
            return torch.full_like(wide.flatten(1)[:, 0], torch.inf)
        below, above = wide - broadcastable(self.lo, wide), broadcastable(self.hi, wide) - wide
        return row_norm(torch.maximum(below, above), ORDER[self.norm])
