"""The fast adaptive boundary attack (Croce and Hein, "Minimally distorted Adversarial Examples with
a Fast Adaptive Boundary Attack", ICML 2020): not whether a point of the ball fools the model, but
how near the nearest such point is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks import _checks
from pyadv.attacks._attack import Model, Plan, functional
from pyadv.attacks._engine import check_first, may_compact, predict
from pyadv.attacks._hyperplane import offset_to_hyperplane
from pyadv.attacks._losses import Loss, check_classes, ranked_targets
from pyadv.attacks._minimum import (
    ORDER,
    MinimumNorm,
    distance,
    nearest_boundary,
    other_classes,
    row_norm,
)
from pyadv.attacks._model import Output, borrowed, gradients_on, owned, pick_logits, unwrap
from pyadv.attacks._result import Perturbed
from pyadv.attacks._rows import Parameter, Settings
from pyadv.attacks._rules import PlainRule
from pyadv.attacks._start import Noise, start_on_sphere
from pyadv.reference._common import clip_to_box, per_row, rows, widen

_START_EPS = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}  # of the authors, for the box [0, 1]
_SHORTEST = 1e-8  # way to a hyperplane, in the weights of the two ways


class FAB(MinimumNorm):
    """The nearest point that fools the model.

    Each step takes the model as linear at the iterate, picks the nearest of its decision
    boundaries, and goes there: from the iterate and, with a share of at most `alpha_max`, from x,
    both by the shortest way inside the box. Points that fool the model are pulled back towards x.

    `attack(x, y)` returns the nearest point found, x itself where there is none or where x is not
    classified as y. `attack.run(x, y)` gives a `MinimumNormResult`. A step costs two forward
    passes and one input gradient per class other than y. The module, its state and torch's
    generator are afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1): what distance means.
        eps: radius within which a point counts as a success in `run`, in units of x; float or per
            sample (B,); None for any. The result is the nearest point either way.
        steps: number of steps.
        restarts: the first from x, the others from the sphere of radius eps / 2 around it (with
            eps=None 0.15 in Linf, 0.5 in L2, 2.5 in L1, times the width of the box); run as one
            batch, the nearest point wins.
        alpha_max: largest share of the way from x, in [0, 1].
        eta: how far beyond the hyperplane to go, >= 1.
        beta: what stays of x_adv - x after a success, in (0, 1).
        lo, hi: the box inputs lie in; None for no bound; float, or tensor like eps in `PGD`.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact: leave samples out that the model gets wrong at x: "auto", True or False.
        output, validate, speed: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: str | float = "Linf",
        eps: Parameter | None = None,
        steps: int = 100,
        restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        lo: Parameter | None = 0.0,
        hi: Parameter | None = 1.0,
        seed: int | None = None,
        compact: bool | str = "auto",
        output: Output = None,
        validate: bool | str = "auto",
        speed: str = "exact",
    ):
        norm = _checks.canonical_norm(norm)
        if not 0 <= alpha_max <= 1:
            raise ValueError(f"alpha_max must be a share in [0, 1], got {alpha_max!r}")
        if not 1 <= eta < math.inf:
            raise ValueError(f"eta must be a finite number >= 1, got {eta!r}")
        if not 0 < beta < 1:
            raise ValueError(f"beta must lie in (0, 1), got {beta!r}")
        bounded = isinstance(lo, (int, float)) and isinstance(hi, (int, float))
        start_eps = _START_EPS[norm] * (abs(hi - lo) if bounded else 1.0)
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        settings = Settings(
            norm=norm,
            eps=start_eps if eps is None else eps,
            alpha=0.0,
            steps=steps,
            loss=Loss("margin", False, "fused", "exact"),
            start="keyed" if restarts != 1 else "none",
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            rule=PlainRule(),
            patience=steps,
            start_from=start_on_sphere,
        )
        super().__init__(model, settings, restarts, seed, eps)

    _by_verdict = True

    def _plan(self, model: Model, x: Tensor, y: Tensor) -> Plan:
        return Plan(self.settings, None, 1, 0)  # `_search` chooses among its attempts itself

    def _classes(self, logits: Tensor, y: Tensor) -> Tensor:
        """(attempts, B, m): the classes whose boundaries each attempt looks at."""
        others = other_classes(logits, y)
        return others.expand(self.restarts, *others.shape)

    def _search(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        noise: Noise,
        target: Tensor | None,
        group: Tensor | None = None,
    ) -> Perturbed:
        s, model, x, y = settings, unwrap(model), owned(x), owned(y)
        validate = s.checks_values(x)
        if validate:
            _checks.values(x, {"eps": s.eps}, s.lo, s.hi)
        with gradients_on(), borrowed(model):
            logits = predict(model, x, s)
            check_first(logits, y, s.loss, validate, differentiate=False)
            check_classes(logits)
            right = s.loss.at(logits, y, None)[2]
            y = y.clamp(0, logits.shape[1] - 1)  # other labels are wrong at x, and refused above
            classes, kept = self._classes(logits, y), torch.arange(len(x), device=x.device)
            if may_compact(model, x, s):
                kept = right.nonzero()[:, 0]
            n, m = classes.shape[0], classes.shape[2]
            done = Perturbed(
                torch.empty_like(x).copy_(x),
                right.long(),
                torch.zeros_like(y).index_fill_(0, kept, s.steps),
                torch.ones_like(y).index_fill_(0, kept, 1 + 2 * s.steps * n),
                torch.zeros_like(y).index_fill_(0, kept, s.steps * n * m),
            )
            if not len(kept):
                return done
            tries = _Tries(x, y, classes, kept, noise.restarted(n).ids.view(n, -1), noise)
            try:
                x_adv, length, kappa = self._attempts(model, tries, s, 0, n)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                parts = (self._attempts(model, tries, s, r, r + 1) for r in range(n))
                x_adv, length, kappa = (torch.cat(p) for p in zip(*parts, strict=True))
        nearest, column = length.argmin(0), torch.arange(len(kept), device=x.device)
        x_adv = x_adv[nearest, column]
        done.x_adv[kept] = torch.where(per_row(right[kept], x_adv), x_adv, x[kept])
        done.kappa[kept] += torch.where(right[kept], kappa[nearest, column], 0)
        return done

    def _attempts(
        self, model: Model, tries: _Tries, s: Settings, first: int, last: int
    ) -> tuple[Tensor, ...]:
        """What `_approach` finds in the attempts first .. last - 1 at each sample, as one batch."""
        kept, shape = tries.kept, (last - first, len(tries.kept))
        sample = kept.repeat(shape[0])
        x, s = tries.x[sample], s.select(sample, tries.x)
        begin = x
        if self.restarts > 1:
            ids = tries.ids[first:last, kept].flatten()
            sphere = (s.start, s.norm, x, s.eps / 2, s.lo, s.hi, replace(tries.noise, ids=ids))
            number = torch.arange(first, last, device=x.device).repeat_interleave(len(kept))
            begin = torch.where(per_row(number % self.restarts == 0, x), x, s.start_from(*sphere))
        classes = tries.classes[first:last, kept].flatten(0, 1)
        found = self._approach(model, x, begin, tries.y[sample], classes, s)
        return tuple(t.unflatten(0, shape) for t in found)

    def _approach(
        self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, classes: Tensor, s: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest points found, their distances (inf: none, the point is x), and how many
        iterates were classified as y."""
        wide = widen(x)
        best, nearest = x, wide.new_full(y.shape, torch.inf)
        kappa = torch.zeros_like(y)
        for k in range(s.steps):
            leaf = x_adv.detach().requires_grad_()
            logits = pick_logits(model(leaf), s.output)
            if k == 0:
                check_first(logits, y, s.loss, validate=False, differentiate=True)
            value, w = nearest_boundary(logits, leaf, y, classes, s.norm)
            at_x = value + rows((wide - widen(x_adv)) * w).sum(1)
            d = offset_to_hyperplane(x_adv, w, value, s.norm, s.lo, s.hi)
            d_x = offset_to_hyperplane(x, w, at_x, s.norm, s.lo, s.hi)
            way, way_x = (row_norm(t, ORDER[s.norm]).clamp(min=_SHORTEST) for t in (d, d_x))
            share = per_row((way / (way + way_x)).clamp(max=self.alpha_max), x)
            point = (widen(x_adv) + self.eta * d) * (1 - share) + (wide + self.eta * d_x) * share
            x_adv = clip_to_box(point.to(x.dtype), s.lo, s.hi)
            still = s.loss.at(predict(model, x_adv, s), y, None)[2]
            kappa += still
            length = distance(x_adv, x, s.norm)
            closer = ~still & (length < nearest)
            best = torch.where(per_row(closer, x), x_adv, best)
            nearest = torch.where(closer, length, nearest)
            back = (wide + (widen(x_adv) - wide) * self.beta).to(x.dtype)
            x_adv = torch.where(per_row(still, x), x_adv, back)
        return best, nearest, kappa


@dataclass
class _Tries:
    """The attempts at a batch: `classes` (attempts, B, m) to look at and `ids` (attempts, B) of the
    noise, for the samples `kept`."""

    x: Tensor
    y: Tensor
    classes: Tensor
    kept: Tensor
    ids: Tensor
    noise: Noise


class TargetedFAB(FAB):
    """FAB-T: towards one class after the other, those that the clean prediction ranks highest after
    the label, all run as one batch.

    Takes what `FAB` takes, and

    Args:
        targets: number of target classes; with fewer other classes, all of them.
        restarts: for each target.

    A step costs two forward passes and one input gradient per target, so the cost does not grow
    with the number of classes. Any class other than y is a success.

    Source: AutoAttack (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks", ICML 2020), section 4.
    """

    def __init__(self, model: Model | None = None, *, targets: int = 9, **settings: Any):
        self.targets = _checks.count("targets", targets, 1)
        super().__init__(model, **settings)

    def _classes(self, logits: Tensor, y: Tensor) -> Tensor:
        targets = ranked_targets(logits, y, self.targets)
        return targets.repeat_interleave(self.restarts, 0)[..., None]


fab = functional("fab", FAB)
targeted_fab = functional("targeted_fab", TargetedFAB)
