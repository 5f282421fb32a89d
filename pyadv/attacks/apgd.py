"""Auto-PGD (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
Diverse Parameter-free Attacks", ICML 2020) in Linf and L2, and in L1 (Croce and Hein, "Mind the
Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", ICML 2021)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from pyadv.engine import checks
from pyadv.engine.attack import Attack, Plan, functional, show
from pyadv.engine.loop import predict
from pyadv.engine.losses import Loss, LossFunction, check_classes, ranked_targets
from pyadv.engine.losses import check as check_loss
from pyadv.engine.results import Perturbed
from pyadv.engine.rounding import leaves_by_rounding, round_inward_
from pyadv.engine.rules import HalvingRule, SparseRule
from pyadv.engine.settable import Setting
from pyadv.engine.starts import PROJECT, SphereStart, start_on_sphere
from pyadv.engine.task import FloatOrTensor, GradientSettings, Model, Task, radius
from pyadv.menus import SPHERE_STARTS, Auto, GradMode, LossName, Norm, Speed
from pyadv.passes.borrow import Output

_DLR_TARGETED_CLASSES = 4  # that the loss compares


class APGD(Attack):
    """Auto-PGD: gradient ascent that chooses its step size for each sample as it goes.

    In Linf and L2, steps with momentum start at 2 eps; at checkpoints the step of a sample that
    makes no progress is halved, and the sample goes back to its best iterate. In L1, steps on few
    coordinates with the exact projection onto ball and box. `attack(x, y)` costs at most
    `steps + 1` forward passes and `steps` input gradients per restart. The module, its state and
    torch's generator are afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x; float, per sample (B,), or (in Linf)
            broadcastable to x. The default, 8/255, is for Linf.
        steps: number of steps.
        loss: what is maximised: "ce" (APGD-CE), "dlr" (APGD-DLR, three classes or more), "margin",
            "slm", or a callable (logits, y) -> (B,), differentiated by autograd.
        start: "keyed" (on the sphere of radius eps, the same for a sample whatever batch it comes
            in), "generator" (the same distribution from torch's generator, drawn as the authors'
            code does), "none", or a callable x -> first iterate, taken as it is.
        restarts: independent starts, run as one batch.
        best: "fooled", the first iterate that fools the model, with which the sample and its other
            restarts leave the attack, and the iterate of highest loss for samples that withstand;
            or "loss", the iterate of highest loss for all.
        targeted: y is the class to reach.
        rho: share of steps in which the loss must rise for the step size to stay (Linf, L2).
        eot: gradients averaged at each iterate, for random models (AutoAttack's "rand" uses 20).
        multi_eps: in L1, three runs with radii 3 eps, 2 eps and eps over 30, 30 and 40 % of the
            steps, each from the best point of the one before; the default in L1, and only there.
        zero_first_check: repeat a mistake of the authors' code in Linf and L2: the first loss is
            compared with 0 instead of the loss at the start, so for cross-entropy it always counts
            as a rise. Published AutoAttack numbers contain it.
        count_held: in L1, choose the coordinates to move as the authors' code does: among all, also
            those that the box lets no further, and never fewer than two. Published AutoAttack
            numbers contain it; on linear models with few coordinates it ends up to 43 % short of
            the optimum.
        lo, hi: the box inputs lie in; None for no bound; float, or tensor like eps.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact, output, grad_mode, validate, speed, graph: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.
    """

    settings: GradientSettings

    loss = Setting("settings.loss.loss")
    best = Setting("settings.best")
    eot = Setting("settings.eot")
    grad_mode = Setting("settings.loss.grad_mode")

    def __init__(
        self,
        model: Model | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        steps: int = 100,
        loss: LossName | LossFunction = "ce",
        start: SphereStart = "keyed",
        restarts: int = 1,
        best: Literal["fooled", "loss"] = "fooled",
        targeted: bool = False,
        rho: float = 0.75,
        eot: int = 1,
        multi_eps: bool | None = None,
        zero_first_check: bool = False,
        count_held: bool = False,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        seed: int | None = None,
        compact: Auto = "auto",
        output: Output = None,
        grad_mode: GradMode = "fused",
        validate: Auto = "auto",
        speed: Speed = "exact",
        graph: Auto = "auto",
    ):
        norm = checks.canonical_norm(norm)
        eps = radius(eps, norm)
        checks.size("eps", eps)
        checks.size("rho", rho, tensor=False)
        checks.choice("best", best, ("fooled", "loss"))
        if not callable(start):
            checks.choice("start", start, SPHERE_STARTS)
        if loss == "kl":
            raise ValueError('loss="kl" belongs to PGD: it is zero at x and knows no label')
        if multi_eps and norm != "L1":
            raise ValueError(f"multi_eps is a schedule of the L1 attack, got norm={norm}")
        self.multi_eps = norm == "L1" if multi_eps is None else multi_eps
        sparse = SparseRule(self.multi_eps or callable(start), published=count_held)
        settings = GradientSettings(
            norm=norm,
            eps=eps,
            alpha=eps if norm == "L1" else 2 * eps,
            steps=steps,
            loss=Loss(check_loss(loss), targeted, grad_mode, "unit" if eot == 1 else "exact"),
            start=start,
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            rule=sparse if norm == "L1" else HalvingRule(rho, zero_first_check),
            patience=0 if best == "fooled" else steps,
            start_from=start_on_sphere,
            best=best,
            eot=eot,
        )
        super().__init__(model, settings, restarts, seed, graph)

    def _search_words(self) -> list[str]:
        return [f"{self.settings.steps} steps", f"loss {show(self.settings.loss.loss)}"]

    def _search(self, task: Task) -> Perturbed:
        if not self.multi_eps:
            return super()._search(task)
        s = task.settings
        early = min(math.ceil(0.3 * s.steps), s.steps // 2)
        found: Perturbed | None = None
        for factor, steps in ((3, early), (2, early), (1, s.steps - 2 * early)):
            radius = factor * s.eps
            stage = replace(s, eps=radius, alpha=radius, steps=steps)
            if factor > 1:
                # A point of a larger ball is no result: all steps are made, for the highest loss.
                stage = replace(stage, best="loss", patience=steps)
            if found is not None:
                begin = PROJECT["L1"](found.x_adv, task.x, radius, s.lo, s.hi)
                if leaves_by_rounding(begin.dtype):
                    round_inward_(begin, task.x, radius, "L1")
                stage = replace(stage, start=lambda _, begin=begin: begin)
            latest = super()._search(replace(task, settings=stage))
            if found is not None:
                latest.kappa += found.kappa
                latest.steps += found.steps
                latest.queries += found.queries
                latest.gradients += found.gradients
            found = latest
        return latest


class TargetedAPGD(APGD):
    """APGD towards one class after the other: those that the clean prediction ranks highest after
    the label, all run as one batch. AutoAttack's APGD-T.

    Takes what `APGD` takes except `loss` and `targeted`, and

    Args:
        targets: number of target classes; with fewer other classes, all of them.
        restarts: starts for each target.

    The loss is the targeted difference of logits ratio, (z_t - z_y) / (z_1 - (z_3 + z_4) / 2) with
    sorted z. It compares four classes; models with two or three are attacked by z_t - z_y.

    Source: Croce and Hein (ICML 2020), equation 7.
    """

    def __init__(self, model: Model | None = None, *, targets: int = 9, **settings: Any):
        for name in ("loss", "targeted"):
            if name in settings:
                raise TypeError(f"TargetedAPGD has no argument {name}: it chooses the targets")
        self.targets = checks.count("targets", targets, 1)
        super().__init__(model, **settings)
        self.settings = replace(
            self.settings, loss=replace(self.settings.loss, loss="dlr_targeted")
        )

    def attempts(self, classes: int) -> int:
        return min(self.targets, classes - 1) * self.restarts

    def _search_words(self) -> list[str]:
        return [f"{self.settings.steps} steps", f"{self.targets} targets"]

    def _plan(self, task: Task) -> Plan:
        s = task.settings
        logits = predict(task.model, task.x, s)
        check_classes(logits)
        if logits.shape[1] < _DLR_TARGETED_CLASSES:
            task = replace(task, settings=replace(s, loss=replace(s.loss, loss="margin_targeted")))
        targets = ranked_targets(logits, task.y, self.targets)
        targets = targets.repeat_interleave(self.restarts, 0)
        return Plan(task, attempts=targets.shape[0], targets=targets.flatten(), queries=1)


apgd = functional("apgd", APGD)
targeted_apgd = functional("targeted_apgd", TargetedAPGD)
