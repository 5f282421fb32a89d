"""The fast adaptive boundary attack, a search for the nearest point that fools the model (Croce
and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML
2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks.minimum_norm import MinimumNorm, box_width, nearest_boundary, other_classes
from pyadv.engine import checks
from pyadv.engine.attack import Plan, functional
from pyadv.engine.compact import Remaining, first_active, may_compact, worth_compacting
from pyadv.engine.loop import check_first, check_values, predict
from pyadv.engine.losses import Loss, check_classes, ranked_targets
from pyadv.engine.norms import distance
from pyadv.engine.results import Perturbed
from pyadv.engine.starts import Noise, start_on_sphere
from pyadv.engine.state import PerSample
from pyadv.engine.task import FloatOrTensor, Model, Settings, Task
from pyadv.menus import AnyNorm, Auto, Norm, Speed
from pyadv.passes.borrow import Output, borrowed, gradients_on, owned, pick_logits, unwrap
from pyadv.reference.hyperplane import boundary_step
from pyadv.tensors import broadcastable, per_row, widen

_START_EPS = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}  # of the authors, for the box [0, 1]
_BOUNDARY_STEP: dict[AnyNorm, Callable[..., Tensor]] = {
    "Linf": ops.linf_boundary_step,
    "L2": ops.l2_boundary_step,
    "L1": partial(boundary_step, "L1"),
}
_CPU_ROWS = 128  # largest batch on the CPU: larger ones only leave the caches


class FAB(MinimumNorm):
    """An attack that finds the nearest point that fools the model.

    Each step takes the model as linear at the iterate, picks the nearest of its decision
    boundaries, and goes there: from the iterate and, with a share of at most `alpha_max`, from x,
    both by the shortest way inside the box. Points that fool the model are pulled back towards x.

    FAB keeps a loop of its own, because its step differs from that of the engine's loop: it takes
    one input gradient per class and a second forward pass at the new point, and several attempts
    at a sample share its radius and its end.

    `attack(x, y)` returns the nearest point found, x itself where there is none or where x is not
    classified as y. `attack.run(x, y)` gives a `MinimumNormResult`. A step costs two forward
    passes and one input gradient per class other than y. The module, its state and torch's
    generator are afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1): what distance means.
        eps: radius within which a point counts as a success in `run`, in units of x; float or per
            sample (B,); None for any.
        steps: number of steps.
        restarts: the first from x, the others from the sphere of radius eps / 2 around it (with
            eps=None 0.15 in Linf, 0.5 in L2, 2.5 in L1, times the width of the box); run as one
            batch (on the CPU in parts of 128 rows), the nearest point wins.
        early_stop: a sample leaves, with all its attempts, at its first point within eps: the same
            verdicts, for less, but not the nearest points.
        alpha_max: largest share of the way from x, in [0, 1].
        eta: how far beyond the hyperplane to go, >= 1.
        beta: what stays of x_adv - x after a success, in (0, 1).
        lo, hi: the box inputs lie in; None for no bound; float, or tensor like eps in `PGD`.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact: leave samples out that the model gets wrong at x, and those that have left: "auto",
            True or False.
        output, validate, speed: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        steps: int = 100,
        restarts: int = 1,
        early_stop: bool = False,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        seed: int | None = None,
        compact: Auto = "auto",
        output: Output = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
    ):
        norm = checks.canonical_norm(norm)
        if early_stop and eps is None:
            raise ValueError("early_stop=True stops within eps, so it needs eps, got None")
        checks.share("alpha_max", alpha_max, zero=True, one=True)
        checks.size("eta", eta, tensor=False)
        if not 1 <= eta < math.inf:
            raise ValueError(f"eta must be a finite number >= 1, got {eta!r}")
        checks.share("beta", beta)
        start_eps = _START_EPS[norm] * box_width(lo, hi)
        self.early_stop, self.alpha_max, self.eta, self.beta = early_stop, alpha_max, eta, beta
        settings = Settings(
            norm=norm,
            eps=start_eps if eps is None else eps,
            steps=steps,
            loss=Loss("margin", False, "fused", "exact"),
            start="keyed" if restarts != 1 else "none",
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            start_from=start_on_sphere,
        )
        super().__init__(model, settings, restarts, seed, eps)

    _by_verdict = True

    def _plan(self, task: Task) -> Plan:
        return Plan(task, 1)  # `_search` chooses among its attempts itself

    def _classes(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return (attempts, B, m): the classes whose boundaries each attempt looks at."""
        others = other_classes(logits, y)
        return others.expand(self.restarts, *others.shape)

    def _search(self, task: Task) -> Perturbed:
        s, model, x, y = task.settings, unwrap(task.model), owned(task.x), owned(task.y)
        check_values(x, s)
        with gradients_on(), borrowed(model, s.bn, s.update_stats):
            logits = predict(model, x, s)
            check_first(logits, y, s.checks_values(x), differentiate=False)
            check_classes(logits)
            right = s.loss.at(logits, y, None)[2]
            y = y.clamp(0, logits.shape[1] - 1)  # other labels are wrong at x, and refused above
            classes, b = self._classes(logits, y), len(x)
            n, m = classes.shape[0], classes.shape[2]
            every, s = self._attempts(x, y, right, classes, task.noise, s)
            places = every.place.unflatten(0, (n, b))
            first, at_once = 0, max(_CPU_ROWS // n, 1) if x.is_cpu else b
            while first < b:
                try:
                    kept = places[:, first : first + at_once].flatten()
                    self._approach(model, every, kept, s)
                    first += at_once
                except torch.OutOfMemoryError:
                    if at_once == 1:
                        raise
                    torch.cuda.empty_cache()
                    at_once = max(at_once // n, 1)
        column = torch.arange(b, device=x.device)
        nearest = every.select(every.length.unflatten(0, (n, b)).argmin(0) * b + column)
        steps = every.steps.unflatten(0, (n, b)).sum(0)
        x_adv = torch.empty_like(x).copy_(nearest.best)
        return Perturbed(x_adv, nearest.kappa, nearest.steps, 1 + 2 * steps, m * steps)

    def _attempts(
        self, x: Tensor, y: Tensor, right: Tensor, classes: Tensor, noise: Noise, s: Settings
    ) -> tuple[_Attempts, Settings]:
        """Return all attempts at all samples before their first step, and the settings of their
        rows. `right` (B,) is False for samples that need no search."""
        n, b = classes.shape[:2]
        place = torch.arange(n * b, device=x.device)
        sample = place % max(b, 1)
        s, x, right = s.select(sample, x), x[sample], right[sample]
        x_adv = x
        if self.restarts > 1:
            from_x = place // max(b, 1) % self.restarts == 0
            sphere = (s.start, s.norm, x, s.eps / 2, s.lo, s.hi, noise.restarted(n))
            x_adv = torch.where(per_row(from_x, x), x, s.start_from(*sphere))
        every = _Attempts(
            x=x,
            y=y[sample],
            classes=classes.flatten(0, 1),
            sample=sample,
            place=place,
            active=right,
            x_adv=x_adv,
            best=x.clone(),
            length=widen(x).new_full(place.shape, torch.inf),
            kappa=right.long(),
            steps=torch.zeros_like(place),
        )
        return every, s

    def _approach(self, model: Model, every: _Attempts, kept: Tensor, s: Settings) -> None:
        """Make all steps of the attempts `kept`, as one batch."""
        remaining = Remaining(kept) if may_compact(model, every.x, s, graph=False) else None
        found = torch.zeros_like(every.sample)  # samples; there are not more than attempts
        r, s = every.select(kept), s.select(kept, every.x)
        for k in range(s.steps):
            size = None if remaining is None else remaining(r.active)
            if size == 0:
                break
            if size is not None and worth_compacting(size, len(r.active), s.steps - k):
                every.store(r)
                kept = first_active(r.active, size)
                r, s = r.select(kept), s.select(kept, r.x)
            self._step(model, r, s, first=k == 0)
            if self.early_stop:
                within = r.length <= broadcastable(s.eps, r.length)
                found.scatter_reduce_(0, r.sample, within.long(), "amax")
                r.active = r.active & (found[r.sample] == 0)
        every.store(r)

    def _step(self, model: Model, r: _Attempts, s: Settings, first: bool) -> None:
        leaf = r.x_adv.detach().requires_grad_()
        logits = pick_logits(model(leaf), s.output, len(leaf))
        if first:
            check_first(logits, r.y, validate=False, differentiate=True)
        value, w = nearest_boundary(logits, leaf, r.y, r.classes, s.norm)
        x, w = widen(r.x), w.to(r.x.dtype)
        where = value, self.alpha_max, self.eta, s.lo, s.hi
        r.x_adv = _BOUNDARY_STEP[s.norm](r.x_adv, w, r.x, *where)
        still = s.loss.at(predict(model, r.x_adv, s), r.y, None)[2]
        r.steps = r.steps + r.active
        r.kappa = r.kappa + (r.active & still)
        length = distance(r.x_adv, r.x, s.norm)
        closer = r.active & ~still & (length < r.length)
        r.best = torch.where(per_row(closer, x), r.x_adv, r.best)
        r.length = torch.where(closer, length, r.length)
        stays = per_row(torch.where(still, 1.0, self.beta).to(x.dtype), x)
        r.x_adv = x.lerp(widen(r.x_adv), stays).to(r.x.dtype)


@dataclass
class _Attempts(PerSample):
    """Attempts at samples, one row per attempt."""

    x: Tensor
    y: Tensor
    classes: Tensor  # (attempts, m) whose boundaries the attempt looks at
    sample: Tensor  # the sample that is attempted
    place: Tensor  # index among all attempts
    active: Tensor
    x_adv: Tensor
    best: Tensor  # the nearest point found, x where there is none
    length: Tensor  # distance from x to `best`, inf where there is none
    kappa: Tensor
    steps: Tensor

    def store(self, r: _Attempts) -> None:
        """Write back what the attempts in `r` have found."""
        for name in ("best", "length", "kappa", "steps"):
            getattr(self, name)[r.place] = getattr(r, name)


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
        self.targets = checks.count("targets", targets, 1)
        super().__init__(model, **settings)

    def attempts(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def _search_words(self) -> list[str]:
        return [*super()._search_words(), f"{self.targets} targets"]

    def _classes(self, logits: Tensor, y: Tensor) -> Tensor:
        targets = ranked_targets(logits, y, self.targets)
        return targets.repeat_interleave(self.restarts, 0)[..., None]


fab = functional("fab", FAB)
targeted_fab = functional("targeted_fab", TargetedFAB)
