"""The checks for gradient masking: signs that attacks were misled rather than withstood.

Sources: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML
2018); Carlini et al., "On Evaluating Adversarial Robustness" (2019), section 5; Hitaj et al.,
"Evaluating the Robustness of Geometry-Aware Instance-Reweighted Adversarial Training" (2021) for
the scale of the logits; the warnings of AutoAttack (Croce and Hein, ICML 2020) for the last four
checks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, TypedDict, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv.attacks import PGD, AttackResult, Square
from pyadv.attacks.ensemble import CLEAN
from pyadv.attacks.processes import Processes, together
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.engine.attack import Attack, Model
from pyadv.engine.loop import predict
from pyadv.engine.losses import Loss
from pyadv.engine.starts import Start
from pyadv.engine.task import FloatOrTensor
from pyadv.evaluation.masking_report import Check, MaskingReport, judged, not_run
from pyadv.evaluation.masking_statistics import (
    HIDDEN,
    OTHER_LOSS,
    STEADY,
    difference,
    percent,
    share,
)
from pyadv.menus import BatchNormMode, GradMode, LossName, Norm
from pyadv.passes.borrow import (
    LeavesEvaluation,
    Output,
    borrowed,
    device_of,
    evaluating,
    gradients_on,
    owned,
    pick_logits,
    unwrap,
)

STEPS = (10, 20, 50, 100)
USUAL_STEPS = 20  # steps of "PGD-20"
SCALES = (10.0, 0.1)
STARTS = 5
EPS_FACTORS = (0.5, 1.5, 2.0, 4.0)
_A = TypeVar("_A", bound=Attack)


class _Plain(TypedDict):
    loss: LossName
    grad_mode: GradMode


class _Common(TypedDict):
    """Arguments that all attacks have."""

    norm: Norm | float
    lo: FloatOrTensor | None
    hi: FloatOrTensor | None
    seed: int
    output: Output


# The cross-entropy as other libraries attack it.
PLAIN: _Plain = {"loss": "ce", "grad_mode": "autograd"}


def check_masking(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm | float = "Linf",
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
    surrogate: Model | None = None,
    queries: int = 500,
    seed: int = 0,
    batch_size: int = 500,
    output: Output = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
) -> MaskingReport:
    """Look for signs that the accuracy of `model` under attack is not robustness.

    The attack under examination is PGD-20 on the plain cross-entropy: steps of eps / 4 from a
    random start, differentiated by autograd as in other libraries. A check is suspicious if:

    - "loss": the margin loss breaks far more samples than the cross-entropy.
    - "logit scale": the cross-entropy of 10 or 0.1 times the logits breaks far more.
    - "steps": 100 steps break far more than 20, or fewer.
    - "starts": 5 random starts break far more than one. The numbers hold how far apart single
      starts end.
    - "radius": a larger ball leaves more samples, or a ball as large as the box leaves any.
    - "square": Square Attack breaks samples that withstood all gradient attacks above.
    - "transfer": adversarial examples of `surrogate` break such samples.
    - "gradients": the input gradient of the cross-entropy at x is exactly zero, or not finite.
    - "randomised": two forward passes on the same batch differ.
    - "dynamic": logits depend on whether gradients are on, or on the rest of the batch; or
      predicting in eval mode changes parameters or buffers.
    - "probabilities": the logits are not negative and sum to 1.

    Differences are paired, over the same samples from the same starts, and reduced by twice their
    standard error, so that few samples raise no alarm by chance. An alarm is a reason to attack in
    another way, not a proof. Silence is no proof either: run AutoAttack then.

    The cost per correctly classified sample is up to 340 gradient steps, 100 of them for "steps",
    and `queries` forward passes for samples that no gradient attack broke. 500 to 2,000 samples are
    enough. The model is attacked in eval mode and gets its modes back; starts are keyed by the
    sample's values, so the result does not depend on `batch_size`.

    Args:
        model: maps (B, ...) to logits (B, C); batches move to the device of its parameters.
        x: (N, ...) inputs in the box, N >= 1.
        y: (N,) int64 labels.
        eps: radius of the ball, in units of x, > 0.
        norm: "Linf", "L2" or "L1".
        lo, hi: the box; None for no bound, in which case the largest radius is the range of x.
        surrogate: another model for the same task, trained independently and on the same device;
            without one "transfer" is not run.
        queries: number of queries of Square Attack, which needs images (B, C, H, W).
        seed: seed of the random starts.
        batch_size: samples per batch, >= 1.
        output: how to find the logits in what the model returns, as in `PGD`.
        progress: "auto" prints to stderr; None is silent; or a callable (check, samples done,
            samples it gets, samples that no gradient attack has broken so far).
        group: as in `evaluate`: processes that divide the samples among themselves.

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), eps, batch_size, and whatever the
            attacks refuse (labels out of range, NaN, inputs outside the box).
    """
    common: _Common = {"norm": norm, "lo": lo, "hi": hi, "seed": seed, "output": output}
    others = () if surrogate is None else (surrogate,)
    with together(model, group, others) as processes:
        s = _Study(model, x, y, eps, batch_size, progress, common, processes)
        with evaluating(s.model) if s.bn == "as_is" else contextlib.nullcontext():
            return _report(s, surrogate, queries)


def _report(s: _Study, surrogate: Model | None, queries: int) -> MaskingReport:
    """Run all checks."""
    always = s.without_attack()
    if s.no_gradient_attack:
        names = ("loss", "logit scale", "steps", "starts", "radius")
        by_gradient = [not_run(name, s.no_gradient_attack) for name in names]
    else:
        plain, steps = s.steps()
        by_gradient = [s.loss(plain), s.scale(plain), steps, s.starts(plain), s.radius(plain)]
    checks = (*by_gradient, s.square(queries), s.transfer(surrogate), *always)
    n = len(s.x)
    return MaskingReport(n, s.norm, float(s.eps), checks, s.curves, s.queries / n, s.gradients / n)


class _Study:
    """The model, the samples, and which samples have withstood every attack so far."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        eps: float,
        batch_size: int,
        progress: Progress | Literal["auto"] | None,
        common: _Common,
        processes: Processes,
    ):
        checks.batch(x, y, None)
        if len(x) == 0:
            raise ValueError(f"x must hold at least one sample, got shape {list(x.shape)}")
        checks.count("batch_size", batch_size, 1)
        if isinstance(eps, Tensor):
            raise TypeError("eps must be one float for all samples, got a Tensor")
        checks.size("eps", eps)
        if eps == 0:
            raise ValueError("eps must be > 0, got 0")
        self.model, self.x, self.y, self.eps, self.common = unwrap(model), x, y, eps, common
        self.norm = checks.canonical_norm(common["norm"])
        self.device = device_of(self.model, x)
        self.batch_size = batch_size
        self.processes, self.progress = processes, processes.progress(progress)
        given = {"x": x, "y": y, "eps": eps, "batch_size": batch_size, **common}
        processes.compare("samples and settings", given)
        self.only_look = self.pgd(steps=0, start="none")
        self.bn: BatchNormMode = "eval"
        self.queries, self.gradients = 1, 0  # the next pass, of one sample
        try:
            predict(self.model, x[:1].to(self.device), self.only_look.settings)
        except LeavesEvaluation:  # attacks refuse it; here "dynamic" tells what it does
            self.bn = "as_is"
            self.only_look = self.as_borrowed(self.only_look)
        self.differentiable = True
        self.clean = self.standing = torch.ones(len(x), dtype=torch.bool, device="cpu")
        self.curves: dict[str, list[tuple[float, float]]] = {}

    # --- Batches and attacks; outcomes are (N,) bool on the CPU.

    def pgd(self, eps: float | None = None, **settings: Any) -> PGD:
        eps = self.eps if eps is None else eps
        return PGD(eps=eps, alpha=eps / 4, **{"steps": USUAL_STEPS, **self.common, **settings})

    def as_borrowed(self, attack: _A) -> _A:
        """Return the attack, which borrows the model as this study does."""
        attack.settings = replace(attack.settings, bn=self.bn)
        return attack

    def run(self, attack: Attack, x: Tensor, y: Tensor, draw: int = 0) -> AttackResult:
        attack = self.as_borrowed(attack)
        result = attack.run(x, y, draw=draw, model=self.model)
        self.queries += int(result.queries.sum())
        self.gradients += int(result.gradients.sum())
        return result

    def each(
        self, name: str, rows: Tensor, look: Callable[[Tensor, Tensor], list[Tensor]]
    ) -> list[Tensor]:
        """Return what `look(x, y)` says about the samples in `rows`, batch by batch.

        `look` returns lists of (B,) bools; the result is a list of (N,) bools, False elsewhere.
        """
        mine = self.processes.part(rows.nonzero()[:, 0])
        everywhere: list[Tensor] = []
        for at, found, *passes, differentiable in self.processes.each(
            self.batches(name, mine, look)
        ):
            everywhere = everywhere or [torch.zeros_like(rows) for _ in found]
            for whole, part in zip(everywhere, found, strict=True):
                whole[at] = part
            self.queries += passes[0]
            self.gradients += passes[1]
            self.differentiable &= differentiable
        return everywhere

    def batches(
        self, name: str, rows: Tensor, look: Callable[[Tensor, Tensor], list[Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor, int, int, bool]]:
        """Yield, for each batch: its rows, what `look` says, forward and backward passes, whether
        the model passes gradients."""
        done = 0
        for part in rows.split(self.batch_size):
            if not len(part):  # torch splits nothing into one empty part
                continue
            counted = self.queries, self.gradients
            at = part.to(self.x.device)
            batch = self.x[at].to(self.device), self.y[at].to(self.device)
            found = torch.stack(look(*batch)).cpu()
            passes = self.queries - counted[0], self.gradients - counted[1]
            self.queries, self.gradients = counted
            yield part, found, *passes, self.differentiable
            done += len(at)
            if self.progress:
                self.progress(name, done, len(rows), int(self.standing.sum()))

    def correct(self, name: str, attack: Attack, draw: int = 0) -> Tensor:
        """Return (N,) bool: correct under the attack. Misclassified samples are not attacked."""
        return self.each(name, self.clean, lambda x, y: [self.run(attack, x, y, draw).correct])[0]

    def white_box(self, name: str, draw: int = 0, **settings: Any) -> Tensor:
        """Return `correct` under PGD within eps, and remember what it leaves standing."""
        correct = self.correct(name, self.pgd(**settings), draw)
        self.standing = self.standing & correct
        return correct

    @property
    def no_attack(self) -> str:
        """Why attacks make no sense here; empty if they do."""
        return "" if self.clean.any() else "No sample is classified correctly"

    @property
    def no_gradient_attack(self) -> str:
        """Why attacks by gradient make no sense here; empty if they do."""
        return self.no_attack or ("" if self.differentiable else "The model passes no gradient")

    # --- The checks that need no attack.

    def without_attack(self) -> list[Check]:
        """Look at the model without attacking it."""
        state = self.state()
        self.clean, dead, random, mode, batch, sums = self.each(CLEAN, self.clean, self.probe)
        self.standing = self.clean
        mine = [k for k, v in self.state().items() if not torch.equal(v, state[k])]
        changed = sorted(set(self.processes.each(mine)))
        if random.any():
            mode = batch = torch.zeros_like(random)  # chance explains these differences
        return [
            self.input_gradients(dead),
            judged(
                "randomised",
                f"Two forward passes on one batch differ at {percent(random)} of the samples",
                "every step sees another model; attacks must average over several (eot)",
                random.any(),
                {"differ": share(random)},
            ),
            judged(
                "dynamic",
                f"Logits change at {percent(mode)} of the samples when gradients are on, and at "
                f"{percent(batch)} with the rest of the batch; predicting changes {len(changed)} "
                "parameters and buffers",
                "what is attacked is not what predicts",
                mode.any() or batch.any() or changed,
                {"mode": share(mode), "batch": share(batch), "changed": float(len(changed))},
            ),
            judged(
                "probabilities",
                f"The logits are not negative and sum to 1 at {percent(sums)} of the samples",
                "attacks need what goes into the softmax, not what comes out",
                sums.all(),
                {"sum_to_1": share(sums)},
            ),
        ]

    def probe(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return, for one batch: correct, no gradient, differs from pass to pass, with gradients
        on, in other company; outputs are probabilities."""
        first = self.run(self.only_look, x, y)
        z = first.logits
        checks.logits(z, y)
        others = x.clone()  # every second sample is replaced by another one
        others[1::2] = x[::2][: len(x) // 2]
        again, mixed = (predict(self.model, b, self.only_look.settings) for b in (x, others))
        with gradients_on(), borrowed(self.model, self.bn):
            leaf = owned(x).clone().requires_grad_()
            with_gradients = pick_logits(self.model(leaf), self.common["output"])
            dead = self.dead(leaf, with_gradients, owned(y))
        self.queries += 3 * len(x)
        self.gradients += len(x)
        depends = _differ(mixed, z)
        depends[1::2] = False
        return [
            first.correct,
            dead,
            _differ(again, z),
            _differ(with_gradients.detach(), z),
            depends,
            checks.are_probabilities(z),
        ]

    def dead(self, leaf: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """Return (B,): the input gradient of the plain cross-entropy is zero or not finite."""
        grad = None
        if logits.requires_grad:
            _, start, _ = Loss("ce", False, "autograd", "exact").at(logits, y, None)
            (grad,) = torch.autograd.grad(logits, leaf, start, allow_unused=True)
        if grad is None:
            self.differentiable = False
            return torch.ones_like(y, dtype=torch.bool)
        rows = grad.flatten(1)
        return (rows == 0).all(1) | ~rows.isfinite().all(1)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the model's parameters and buffers, by name."""
        if not isinstance(self.model, torch.nn.Module):
            return {}
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: value.detach().clone() for name, value in named}

    def input_gradients(self, dead: Tensor) -> Check:
        fault = "the cross-entropy gives no direction, so that plain attacks do not move"
        if not self.differentiable:
            fault = "the model passes none to its input, so that only search and transfer attack it"
        return judged(
            "gradients",
            f"The input gradient of the cross-entropy is zero or not finite at {percent(dead)} "
            "of the samples",
            fault,
            not self.differentiable or difference(dead) > HIDDEN,
            {"dead": share(dead)},
        )

    # --- Attacks by gradient.

    def steps(self) -> tuple[Tensor, Check]:
        """Run one attack of the most steps and look at it on its way."""

        def climb(x: Tensor, y: Tensor) -> list[Tensor]:
            start: Start = "keyed"
            before = 0
            correct: list[Tensor] = []
            for k in STEPS:
                part = self.run(self.pgd(steps=k - before, start=start, **PLAIN), x, y)
                correct.append(part.correct)
                start, before = _at(part.x_adv), k
            return correct

        outcomes = self.each("steps", self.clean, climb)
        for correct in outcomes:
            self.standing = self.standing & correct
        self.curves["steps"] = _curve((0, *STEPS), (self.clean, *outcomes))
        return outcomes[STEPS.index(USUAL_STEPS)], _flat(outcomes)

    def loss(self, plain: Tensor) -> Check:
        margin = self.white_box("loss", loss="margin")
        return judged(
            "loss",
            f"PGD-20 leaves {percent(plain)} with the cross-entropy and {percent(margin)} with "
            "the margin loss",
            "the cross-entropy misleads, as on models of reweighted training",
            difference(plain, margin) > OTHER_LOSS,
            {"cross_entropy": share(plain), "margin": share(margin)},
        )

    def scale(self, plain: Tensor) -> Check:
        scaled = {k: self.white_box("logit scale", loss=_scaled_cross_entropy(k)) for k in SCALES}
        found = " and ".join(f"{percent(v)} at {k:g} times" for k, v in scaled.items())
        return judged(
            "logit scale",
            f"PGD-20 leaves {percent(plain)} with the logits as they are, {found}",
            "the scale of the logits hides samples from the cross-entropy",
            max(difference(plain, correct) for correct in scaled.values()) > OTHER_LOSS,
            {"1": share(plain), **{f"{k:g}": share(v) for k, v in scaled.items()}},
        )

    def starts(self, plain: Tensor) -> Check:
        others = (self.white_box("starts", draw, **PLAIN) for draw in range(1, STARTS))
        single = torch.stack([plain, *others])
        worst, shares = single.all(0), [share(correct) for correct in single]
        spread = max(shares) - min(shares)
        return judged(
            "starts",
            f"PGD-20 leaves {percent(plain)} from one random start and {percent(worst)} from "
            f"{STARTS}, single ones {100 * spread:.1f} points apart",
            "where the attack begins decides how it ends",
            difference(plain, worst) > STEADY,
            {"one": shares[0], "all": share(worst), "spread": spread},
        )

    def radius(self, plain: Tensor) -> Check:
        full = max(self.full_radius(), self.eps)
        radii = {f * self.eps for f in EPS_FACTORS if f * self.eps < full} | {full}
        outcomes = {0.0: self.clean, self.eps: plain}
        for r in sorted(radii - {self.eps}):
            outcomes[r] = self.correct("radius", self.pgd(r, **PLAIN))
        at, ordered = zip(*sorted(outcomes.items()), strict=True)
        self.curves["eps"] = curve = _curve(at, ordered)
        left = difference(ordered[-1]) > STEADY
        rises = any(difference(b, a) > STEADY for a, b in pairwise(ordered))
        return judged(
            "radius",
            f"PGD-20 leaves {percent(ordered[-1])} at radius {full:.4g}, the largest that matters",
            "points of every class lie within the largest radius, yet samples are left"
            if left
            else "more is left at some radius than at a smaller one",
            left or rises,
            {f"{r:.4g}": share for r, share in curve},
        )

    def full_radius(self) -> float:
        """Return the radius of a ball that holds the whole box, whichever sample is its centre."""
        x, lo, hi = self.x, self.common["lo"], self.common["hi"]
        low = x.min().cpu() if lo is None else torch.as_tensor(lo, device="cpu")
        high = x.max().cpu() if hi is None else torch.as_tensor(hi, device="cpu")
        width, d = float((high - low).max()), x[0].numel()
        return width * {"Linf": 1.0, "L2": math.sqrt(d), "L1": float(d)}[self.norm]

    # --- Attacks without the model's gradient.

    def square(self, queries: int) -> Check:
        attack = Square(eps=self.eps, queries=queries, **self.common)
        needs = "" if self.x.dim() == 4 else "Square Attack needs images"
        if self.no_attack or needs:
            return not_run("square", self.no_attack or needs)
        return self.hidden(
            "square",
            f"{queries} queries of Square Attack",
            "the gradients hide what a random search finds",
            lambda x, y: [self.run(attack, x, y).correct],
        )

    def transfer(self, surrogate: Model | None) -> Check:
        needs = "No surrogate model was given" if surrogate is None else ""
        if self.no_attack or needs:
            return not_run("transfer", self.no_attack or needs)
        attack = self.pgd(loss="margin")

        def look(x: Tensor, y: Tensor) -> list[Tensor]:
            x_adv = attack.perturb(x, y, draw=0, model=surrogate).x_adv
            return [self.run(self.only_look, x_adv, y).correct]

        return self.hidden(
            "transfer",
            "PGD-20 on the surrogate",
            "the gradients of another model do better than its own",
            look,
        )

    def hidden(
        self, name: str, what: str, fault: str, look: Callable[[Tensor, Tensor], list[Tensor]]
    ) -> Check:
        """Look for samples that `look` breaks although they withstood all attacks by the model's
        own gradients."""
        correct = self.each(name, self.standing, look)[0] if self.standing.any() else self.standing
        broken = self.standing & ~correct
        return judged(
            name,
            f"{percent(self.standing)} withstood the attacks by gradient; {what} then broke "
            f"{percent(broken)} of all samples",
            fault,
            difference(broken) > HIDDEN,
            {"withstood": share(self.standing), "broken": share(broken)},
        )


def _flat(outcomes: list[Tensor]) -> Check:
    """Return the check of whether more steps still change the outcome."""
    usual, most = outcomes[STEPS.index(USUAL_STEPS)], outcomes[-1]
    falls, rises = difference(usual, most) > STEADY, difference(most, usual) > STEADY
    return judged(
        "steps",
        f"PGD leaves {', '.join(map(percent, outcomes))} after {', '.join(map(str, STEPS))} steps",
        f"{USUAL_STEPS} steps are too few to tell" if falls else "more steps leave more",
        falls or rises,
        {str(k): share(correct) for k, correct in zip(STEPS, outcomes, strict=True)},
    )


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Return (B,): the rows differ by more than rounding."""
    scale = torch.where(b.isfinite(), b, 0.0).abs().amax(1, keepdim=True)
    same = (a == b) | ((a - b).abs() <= _rounding(b) * scale)
    return ~same.all(1)


def _rounding(t: Tensor) -> float:
    """Return a relative tolerance far above what sums in another order differ by."""
    return math.sqrt(torch.finfo(t.dtype).eps)


def _scaled_cross_entropy(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    def scaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(factor * logits, y, reduction="none")

    return scaled_cross_entropy


def _at(x_adv: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: x_adv


def _curve(at: tuple[float, ...], outcomes: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    return [(float(v), share(o)) for v, o in zip(at, outcomes, strict=True)]
