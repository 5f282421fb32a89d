"""Is it really robust? Signs that an attack was misled and not withstood.

Sources: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML
2018); Carlini et al., "On Evaluating Adversarial Robustness" (2019), section 5; Hitaj et al.,
"Evaluating the Robustness of Geometry-Aware Instance-Reweighted Adversarial Training" (2021) for
the scale of the logits; the warnings of AutoAttack (Croce and Hein, ICML 2020) for the last four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv.attacks import PGD, AttackResult, Square
from pyadv.attacks.autoattack import Lines
from pyadv.attacks.ensemble import CLEAN, Progress
from pyadv.engine import checks
from pyadv.engine.attack import GradientAttack, Model
from pyadv.engine.loop import predict
from pyadv.engine.losses import Loss
from pyadv.passes.borrow import (
    Output,
    borrowed,
    device_of,
    gradients_on,
    owned,
    pick_logits,
    unwrap,
)

# A check is suspicious when the lower end of the interval of `difference` is above its constant.
SURE = 2.0  # standard errors that the interval reaches down: 1 honest model in 40 at the threshold
# What another loss or another scale of the logits may gain. On CIFAR-10, adversarial training and
# TRADES lose at most 4 points from PGD-20 to AutoAttack, GAIRAT 14 to the margin loss alone.
OTHER_LOSS = 0.04
# What more steps, other starts and a larger radius may change: less than 1 point on honest models.
STEADY = 0.02
# Share of samples broken only without the model's gradients, or that have none. AutoAttack warns
# at 0.2 %, but after attacks of thousands of passes.
HIDDEN = 0.01

STEPS = (10, 20, 50, 100)
USUAL_STEPS = 20  # of "PGD-20"
SCALES = (10.0, 0.1)
STARTS = 5
EPS_FACTORS = (0.5, 1.5, 2.0, 4.0)
PLAIN = {"loss": "ce", "grad_mode": "autograd"}  # the cross-entropy as other libraries attack it

OK, SUSPICIOUS, NOT_RUN = "ok", "suspicious", "not run"


@dataclass(frozen=True)
class Check:
    """One comparison.

    `verdict` is "ok", "suspicious" or "not run"; `text` says in a sentence what was compared, and
    why it was not or what that means; `fault` is its end, what it means, if suspicious, else empty.
    `numbers` holds what was compared: shares of all samples, in [0, 1].
    """

    name: str
    verdict: str
    text: str
    fault: str
    numbers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class MaskingReport:
    """The checks of `n` samples at radius `eps` of `norm`.

    `curves` holds robust accuracy in [0, 1] as (value, accuracy) pairs: "steps" and "eps", each
    from 0, the clean accuracy. `queries` and `gradients` are forward and backward passes, on
    average over the samples.
    """

    n: int
    norm: str
    eps: float
    checks: tuple[Check, ...]
    curves: dict[str, list[tuple[float, float]]]
    queries: float
    gradients: float

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(check.name for check in self.checks)
        raise KeyError(f"no check {name!r}; there are {names}")

    @property
    def masked(self) -> bool:
        """Whether a check found something."""
        return any(check.verdict == SUSPICIOUS for check in self.checks)

    @property
    def summary(self) -> str:
        """One line: what looks masked and why."""
        ran = [check for check in self.checks if check.verdict != NOT_RUN]
        found = [check for check in ran if check.verdict == SUSPICIOUS]
        if not found:
            seen = f"{100 * smallest_difference(self.n, OTHER_LOSS):.0f} points"
            return (
                f"Nothing looks masked: {len(ran)} of {len(self.checks)} checks ran, all ok; with "
                f"{self.n:,} samples another loss would have to break {seen} more to be noticed."
            )
        why = "; ".join(f"{check.fault} ({check.name})" for check in found)
        return f"Looks masked, by {len(found)} of {len(ran)} checks: {why}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "norm": self.norm,
            "eps": self.eps,
            "masked": self.masked,
            "summary": self.summary,
            "checks": [check.to_dict() for check in self.checks],
            "curves": {k: [list(point) for point in v] for k, v in self.curves.items()},
            "queries": self.queries,
            "gradients": self.gradients,
        }

    def to_markdown(self) -> str:
        """The summary and a table of the checks."""
        rows = (f"| {c.name} | {c.verdict} | {c.text} |" for c in self.checks)
        head = "| check | verdict | what was compared |", "|---|---|---|"
        return "\n".join((self.summary, "", *head, *rows))

    def __str__(self) -> str:
        lines = [f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}", self.summary]
        return "\n".join(lines + [f"{c.name:<14}{c.verdict:<12}{c.text}" for c in self.checks])


def check_masking(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str | float = "Linf",
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    surrogate: Model | None = None,
    queries: int = 500,
    seed: int = 0,
    batch_size: int = 500,
    output: Output = None,
    progress: Progress | str | None = "auto",
) -> MaskingReport:
    """Look for signs that the accuracy of `model` under attack is not robustness.

    The attack looked at is PGD-20 on the plain cross-entropy: steps of eps / 4 from a random start,
    differentiated by autograd as other libraries do. The checks, by name:

    - "loss": the margin loss instead breaks far more.
    - "logit scale": so does the cross-entropy of 10 or 0.1 times the logits.
    - "steps": 100 steps break far more than 20, or fewer.
    - "starts": so do 5 random starts; how far apart single ones end is in the numbers.
    - "radius": a larger ball is no harder, and one as large as the box leaves nothing.
    - "square": Square Attack breaks samples that withstood all gradient attacks above.
    - "transfer": so do adversarial examples of `surrogate`.
    - "gradients": the input gradient of the cross-entropy at x is exactly zero, or not finite.
    - "randomised": two forward passes on the same batch differ.
    - "dynamic": logits depend on whether gradients are on, or on the rest of the batch; or
      parameters or buffers change by predicting in eval mode.
    - "probabilities": the logits are not negative and sum to 1.

    Differences are paired: of the same samples from the same starts, less twice their standard
    error, so that few samples do not raise an alarm by chance. An alarm is a reason to attack in
    another way, not a proof; that all are silent is none either: then run AutoAttack.

    Cost per correctly classified sample: up to 340 gradient steps, 100 of them for "steps"; and
    `queries` forward passes for those that no gradient attack broke. 500 to 2,000 samples are
    enough. The model is attacked in eval mode and gets its modes back; starts are keyed by the
    sample's values, so the result does not depend on `batch_size`.

    Args:
        model: maps (B, ...) to logits (B, C); batches move to the device of its parameters.
        x: (N, ...) inputs in the box, N >= 1.
        y: (N,) int64 labels.
        eps: radius of the ball, in units of x, > 0.
        norm: "Linf", "L2" or "L1".
        lo, hi: the box; None for no bound, and then the largest radius is the range of x.
        surrogate: another model for the same task, trained independently and on the same device;
            without one "transfer" is not run.
        queries: of Square Attack, which needs images (B, C, H, W).
        seed: of the random starts.
        batch_size: samples per batch, >= 1.
        output: how to find the logits in what the model returns, as in `PGD`.
        progress: "auto" writes to stderr; None is silent; or a callable (check, samples done,
            samples it has, samples that no gradient attack has broken so far).

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), eps, batch_size, and whatever the
            attacks refuse (labels out of range, NaN, inputs outside the box).
    """
    common = {"norm": norm, "lo": lo, "hi": hi, "seed": seed, "output": output}
    s = _Study(model, x, y, eps, batch_size, progress, common)
    always = s.without_attack()
    if s.no_gradient_attack:
        names = ("loss", "logit scale", "steps", "starts", "radius")
        by_gradient = [_not_run(name, s.no_gradient_attack) for name in names]
    else:
        plain, steps = s.steps()
        by_gradient = [s.loss(plain), s.scale(plain), steps, s.starts(plain), s.radius(plain)]
    checks = (*by_gradient, s.square(queries), s.transfer(surrogate), *always)
    n = len(x)
    return MaskingReport(n, s.norm, float(eps), checks, s.curves, s.queries / n, s.gradients / n)


class _Study:
    """The model, the samples, and which of them every attack so far has left standing."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        eps: float,
        batch_size: int,
        progress: Progress | str | None,
        common: dict[str, Any],
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
        self.progress = Lines() if progress == "auto" else progress
        self.only_look = self.pgd(steps=0, start="none")
        self.differentiable = True
        self.queries = self.gradients = 0
        self.clean = self.standing = torch.ones(len(x), dtype=torch.bool)
        self.curves: dict[str, list[tuple[float, float]]] = {}

    # --- Batches and attacks; outcomes are (N,) bool on the CPU.

    def pgd(self, eps: float | None = None, **settings: Any) -> PGD:
        eps = self.eps if eps is None else eps
        return PGD(eps=eps, alpha=eps / 4, **{"steps": USUAL_STEPS, **self.common, **settings})

    def run(self, attack: GradientAttack, x: Tensor, y: Tensor, draw: int = 0) -> AttackResult:
        result = attack.run(x, y, draw=draw, model=self.model)
        self.queries += int(result.queries.sum())
        self.gradients += int(result.gradients.sum())
        return result

    def each(
        self, name: str, rows: Tensor, look: Callable[[Tensor, Tensor], list[Tensor]]
    ) -> list[Tensor]:
        """What `look` (x, y) says about each batch of `rows`, in (B,) bools; as (N,) bools that are
        False elsewhere."""
        total, done, parts = int(rows.sum()), 0, []
        for at in rows.nonzero()[:, 0].split(self.batch_size):
            at = at.to(self.x.device)
            batch = self.x[at].to(self.device), self.y[at].to(self.device)
            parts.append(torch.stack(look(*batch)).cpu())
            done += len(at)
            if self.progress:
                self.progress(name, done, total, int(self.standing.sum()))
        found = torch.cat(parts, 1)
        everywhere = torch.zeros(len(found), len(rows), dtype=torch.bool)
        everywhere[:, rows] = found
        return list(everywhere)

    def correct(self, name: str, attack: GradientAttack, draw: int = 0) -> Tensor:
        """Under the attack; samples that never were correct are not attacked."""
        return self.each(name, self.clean, lambda x, y: [self.run(attack, x, y, draw).correct])[0]

    def white_box(self, name: str, draw: int = 0, **settings: Any) -> Tensor:
        """The same, by gradients within eps."""
        correct = self.correct(name, self.pgd(**settings), draw)
        self.standing = self.standing & correct
        return correct

    @property
    def no_attack(self) -> str:
        """Why attacks make no sense; empty if they do."""
        return "" if self.clean.any() else "No sample is classified correctly"

    @property
    def no_gradient_attack(self) -> str:
        return self.no_attack or ("" if self.differentiable else "The model passes no gradient")

    # --- The checks that need no attack.

    def without_attack(self) -> list[Check]:
        state = self.state()
        self.clean, dead, random, mode, batch, sums = self.each(CLEAN, self.clean, self.probe)
        self.standing = self.clean
        changed = [k for k, v in self.state().items() if not torch.equal(v, state[k])]
        if random.any():
            mode = batch = torch.zeros_like(random)  # differences that chance makes
        return [
            self.input_gradients(dead),
            _check(
                "randomised",
                f"Two forward passes on one batch differ at {_percent(random)} of the samples",
                "every step sees another model; attacks must average over several (eot)",
                random.any(),
                {"differ": _share(random)},
            ),
            _check(
                "dynamic",
                f"Logits change at {_percent(mode)} of the samples when gradients are on, and at "
                f"{_percent(batch)} with the rest of the batch; predicting changes {len(changed)} "
                "parameters and buffers",
                "what is attacked is not what predicts",
                mode.any() or batch.any() or changed,
                {"mode": _share(mode), "batch": _share(batch), "changed": float(len(changed))},
            ),
            _check(
                "probabilities",
                f"The logits are not negative and sum to 1 at {_percent(sums)} of the samples",
                "attacks need what goes into the softmax, not what comes out",
                sums.all(),
                {"sum_to_1": _share(sums)},
            ),
        ]

    def probe(self, x: Tensor, y: Tensor) -> list[Tensor]:
        first = self.run(self.only_look, x, y)
        z = first.logits
        checks.logits(z, y)
        others = x.clone()  # every second sample gives its place to another
        others[1::2] = x[::2][: len(x) // 2]
        again, mixed = (predict(self.model, b, self.only_look.settings) for b in (x, others))
        with gradients_on(), borrowed(self.model):
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
        """(B,): the input gradient of the plain cross-entropy is zero or not finite."""
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
        if not isinstance(self.model, torch.nn.Module):
            return {}
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: value.detach().clone() for name, value in named}

    def input_gradients(self, dead: Tensor) -> Check:
        fault = "the cross-entropy gives no direction, so that plain attacks do not move"
        if not self.differentiable:
            fault = "the model passes none to its input, so that only search and transfer attack it"
        return _check(
            "gradients",
            f"The input gradient of the cross-entropy is zero or not finite at {_percent(dead)} "
            "of the samples",
            fault,
            not self.differentiable or difference(dead) > HIDDEN,
            {"dead": _share(dead)},
        )

    # --- Attacks by gradient.

    def steps(self) -> tuple[Tensor, Check]:
        """One attack of the most steps, looked at on its way."""

        def climb(x: Tensor, y: Tensor) -> list[Tensor]:
            start, before, correct = "keyed", 0, []
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
        return _check(
            "loss",
            f"PGD-20 leaves {_percent(plain)} with the cross-entropy and {_percent(margin)} with "
            "the margin loss",
            "the cross-entropy misleads, as on models of reweighted training",
            difference(plain, margin) > OTHER_LOSS,
            {"cross_entropy": _share(plain), "margin": _share(margin)},
        )

    def scale(self, plain: Tensor) -> Check:
        scaled = {k: self.white_box("logit scale", loss=_scaled_cross_entropy(k)) for k in SCALES}
        found = " and ".join(f"{_percent(v)} at {k:g} times" for k, v in scaled.items())
        return _check(
            "logit scale",
            f"PGD-20 leaves {_percent(plain)} with the logits as they are, {found}",
            "the scale of the logits hides samples from the cross-entropy",
            max(difference(plain, correct) for correct in scaled.values()) > OTHER_LOSS,
            {"1": _share(plain), **{f"{k:g}": _share(v) for k, v in scaled.items()}},
        )

    def starts(self, plain: Tensor) -> Check:
        others = (self.white_box("starts", draw, **PLAIN) for draw in range(1, STARTS))
        single = torch.stack([plain, *others])
        worst, shares = single.all(0), [_share(correct) for correct in single]
        spread = max(shares) - min(shares)
        return _check(
            "starts",
            f"PGD-20 leaves {_percent(plain)} from one random start and {_percent(worst)} from "
            f"{STARTS}, single ones {100 * spread:.1f} points apart",
            "where the attack begins decides how it ends",
            difference(plain, worst) > STEADY,
            {"one": shares[0], "all": _share(worst), "spread": spread},
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
        return _check(
            "radius",
            f"PGD-20 leaves {_percent(ordered[-1])} at radius {full:.4g}, the largest that matters",
            "points of every class lie within the largest radius, yet samples are left"
            if left
            else "more is left at some radius than at a smaller one",
            left or rises,
            {f"{r:.4g}": share for r, share in curve},
        )

    def full_radius(self) -> float:
        """Of a ball around any sample that holds all others."""
        x, lo, hi = self.x, self.common["lo"], self.common["hi"]
        low = x.min().cpu() if lo is None else torch.as_tensor(lo).cpu()
        high = x.max().cpu() if hi is None else torch.as_tensor(hi).cpu()
        width, d = float((high - low).max()), x[0].numel()
        return width * {"Linf": 1.0, "L2": math.sqrt(d), "L1": float(d)}[self.norm]

    # --- Attacks without the model's gradient.

    def square(self, queries: int) -> Check:
        attack = Square(eps=self.eps, queries=queries, **self.common)
        needs = "" if self.x.dim() == 4 else "Square Attack needs images"
        if self.no_attack or needs:
            return _not_run("square", self.no_attack or needs)
        return self.hidden(
            "square",
            f"{queries} queries of Square Attack",
            "the gradients hide what a random search finds",
            lambda x, y: [self.run(attack, x, y).correct],
        )

    def transfer(self, surrogate: Model | None) -> Check:
        needs = "No surrogate model was given" if surrogate is None else ""
        if self.no_attack or needs:
            return _not_run("transfer", self.no_attack or needs)
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
        """What breaks samples that withstood all attacks by the model's own gradients."""
        correct = self.each(name, self.standing, look)[0] if self.standing.any() else self.standing
        broken = self.standing & ~correct
        return _check(
            name,
            f"{_percent(self.standing)} withstood the attacks by gradient; {what} then broke "
            f"{_percent(broken)} of all samples",
            fault,
            difference(broken) > HIDDEN,
            {"withstood": _share(self.standing), "broken": _share(broken)},
        )


def difference(more: Tensor, fewer: Tensor | None = None) -> float:
    """The lower end of the interval of share(more) - share(fewer), two (N,) bools of the same
    samples, `SURE` standard errors down. Without `fewer`, of share(more).

    Half a sample is added to each of the four counts, without which small and one-sided samples
    would seem certain (Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005).
    """
    fewer = torch.zeros_like(more) if fewer is None else fewer
    n = len(more) + 2
    up, down = ((int((a & ~b).sum()) + 0.5) / n for a, b in ((more, fewer), (fewer, more)))
    return (up - down) - SURE * math.sqrt((up + down - (up - down) ** 2) / n)


def smallest_difference(n: int, threshold: float) -> float:
    """The least share of n samples that `difference`, all in one direction, finds above the
    threshold; 1 where even all would not do."""
    for k in range(1, n + 1):
        if difference(torch.arange(n) < k) > threshold:
            return k / n
    return 1.0


def _check(name: str, compared: str, fault: str, wrong: Any, numbers: dict[str, float]) -> Check:
    if wrong:
        return Check(name, SUSPICIOUS, f"{compared}: {fault}.", fault, numbers)
    return Check(name, OK, f"{compared}.", "", numbers)


def _not_run(name: str, reason: str) -> Check:
    return Check(name, NOT_RUN, f"{reason}.", "", {})


def _flat(outcomes: list[Tensor]) -> Check:
    usual, most = outcomes[STEPS.index(USUAL_STEPS)], outcomes[-1]
    falls, rises = difference(usual, most) > STEADY, difference(most, usual) > STEADY
    return _check(
        "steps",
        f"PGD leaves {', '.join(map(_percent, outcomes))} after {', '.join(map(str, STEPS))} steps",
        f"{USUAL_STEPS} steps are too few to tell" if falls else "more steps leave more",
        falls or rises,
        {str(k): _share(correct) for k, correct in zip(STEPS, outcomes, strict=True)},
    )


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """(B,): which rows differ by more than rounding."""
    scale = torch.where(b.isfinite(), b, 0.0).abs().amax(1, keepdim=True)
    same = (a == b) | ((a - b).abs() <= _rounding(b) * scale)
    return ~same.all(1)


def _rounding(t: Tensor) -> float:
    """Sums in another order end far nearer than the square root of the dtype's precision."""
    return math.sqrt(torch.finfo(t.dtype).eps)


def _scaled_cross_entropy(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    def scaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(factor * logits, y, reduction="none")

    return scaled_cross_entropy


def _at(x_adv: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: x_adv


def _curve(at: tuple[float, ...], outcomes: tuple[Tensor, ...]) -> list[tuple[float, float]]:
    return [(float(v), _share(o)) for v, o in zip(at, outcomes, strict=True)]


def _share(rows: Tensor) -> float:
    return rows.double().mean().item()


def _percent(rows: Tensor) -> str:
    return f"{100 * _share(rows):.1f} %"
