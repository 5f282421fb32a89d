"""AutoAttack (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
Diverse Parameter-free Attacks", ICML 2020): one attack after the other on the samples that still
stand."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.apgd import APGD, TargetedAPGD
from pyadv.attacks.ensemble import Attack, Ensemble, Findings, Progress
from pyadv.attacks.fab import FAB, TargetedFAB
from pyadv.attacks.pgd import PGD
from pyadv.attacks.square import Square
from pyadv.engine import checks
from pyadv.engine.attack import GradientAttack, Model
from pyadv.engine.task import FloatOrTensor as Parameter
from pyadv.passes.borrow import Output

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_DLR_CLASSES = 3  # that the difference of logits ratio compares
_ENOUGH_CLASSES = 2**31  # for every member, while the model's number is not known
_SUSPICIOUS = 0.002  # share of samples that Square alone breaks (the authors' threshold)


@dataclass(frozen=True)
class Parity:
    """What the authors' code does that this one mends, to repeat published numbers. Each is off by
    default; `Parity.all()` has all of them.

    Attributes:
        zero_first_check: APGD compares its first loss with 0 instead of the loss at the start.
        reseed: `torch.manual_seed(seed)` before each batch of each attack, and all noise from
            torch's generator, Square's positions shared by the batch. The generator is not put
            back, and results depend on the batches.
        autograd: losses as plain expressions, with their rounding: at margins beyond 17 half of the
            float32 gradient of the cross-entropy is gone.
        keep_modes: a model in train mode is attacked in train mode, and its BatchNorm statistics
            move.
        count_held: L1-APGD spends its share of coordinates also on those that the box lets no
            further.
        few_classes: refuse models with fewer classes than an attack has targets (there an
            IndexError), and two classes with the difference of logits ratio.
    """

    zero_first_check: bool = False
    reseed: bool = False
    autograd: bool = False
    keep_modes: bool = False
    count_held: bool = False
    few_classes: bool = False

    @classmethod
    def all(cls) -> Parity:
        return cls(**{f.name: True for f in fields(cls)})


@dataclass
class Member:
    """How a member of AutoAttack searches; each member reads what its attack knows."""

    steps: int = 100  # queries, of Square
    restarts: int = 1
    targets: int = 9
    eot: int = 1
    rho: float = 0.75
    multi_eps: bool = False
    p: float = 0.8


def plan(version: str, norm: str) -> dict[str, Member]:
    """The settings of the members; the L1 ones are those of "Mind the Box" (ICML 2021)."""
    plus, rand = version == "plus", version == "rand"
    l1 = norm == "L1" and not plus and not rand
    apgd = Member(restarts=5 if plus or l1 else 1, eot=20 if rand else 1, multi_eps=l1)
    return {
        "apgd-ce": apgd,
        "apgd-dlr": replace(apgd),
        "apgd-t": Member(targets=5 if l1 else 9, multi_eps=l1),
        "fab": Member(restarts=5 if plus else 1),
        "fab-t": Member(),
        "square": Member(steps=5000),
    }


@dataclass
class EnsembleResult:
    """What the attacks found, a row for each sample.

    `x_adv` is x where no attack succeeded; `correct` (B,) bool says where that is so and the model
    classifies x as y; `prediction` (B,) is the class of x_adv; `broken_by` (B,) the position in
    `names` of what broke the sample, 0 for the clean prediction, -1 for nothing; `queries` and
    `gradients` (B, len(names)) count forward and backward passes.
    """

    x_adv: Tensor
    correct: Tensor
    prediction: Tensor
    broken_by: Tensor
    queries: Tensor
    gradients: Tensor
    names: tuple[str, ...]

    @property
    def robust_accuracy(self) -> float:
        return self.correct.float().mean().item()


class AutoAttack:
    """AutoAttack, with the attacks, step counts, restarts and targets of the authors' package.

    - "standard": APGD-CE, APGD-T with 9 targets, FAB-T with 9 targets, Square with 5000 queries. In
      L1 APGD-CE has 5 restarts, APGD-T 5 targets, and both the schedule of radii.
    - "plus": APGD-CE, APGD-DLR and FAB with 5 restarts, Square, APGD-T, FAB-T.
    - "rand": APGD-CE and APGD-DLR with 20 gradients a step, for random models.
    - "custom": the members named in `attacks`, as "standard" has them, or attacks of your own.

    `plan`, name -> `Member`, holds the settings of the members and may be changed before a run.

    Each attack gets the samples that those before it left standing, packed into full batches; a
    sample leaves a batch as soon as it is broken. Random numbers are a function of seed and sample,
    so verdicts do not depend on batches, order or processes.

    Args:
        model: anything that maps x to logits (B, C).
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x.
        version: "standard", "plus", "rand" or "custom".
        attacks: with "custom" only: names out of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in
            the order they run; or a mapping from names to attacks (`PGD(...)`, ...).
        seed: of the keyed noise; torch.initial_seed() by default.
        lo, hi: the box inputs lie in.
        progress: "auto" writes to stderr, a line for each attack, on a terminal also the batches;
            None is silent; or a callable (attack, samples done, samples it has, samples standing).
        parity: faults of the authors' code to repeat; see `Parity`.
        compact, output, validate, speed: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.
    """

    def __init__(
        self,
        model: Model,
        *,
        norm: str | float = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        attacks: Sequence[str] | Mapping[str, Attack] | None = None,
        seed: int | None = None,
        lo: Parameter | None = 0.0,
        hi: Parameter | None = 1.0,
        compact: bool = True,
        output: Output = None,
        validate: bool | str = "auto",
        speed: str = "exact",
        progress: Progress | str | None = "auto",
        parity: Parity | None = None,
    ):
        checks.choice("version", version, (*VERSIONS, "custom"))
        if (version == "custom") != (attacks is not None):
            raise ValueError(f'attacks= belongs to version="custom", got version={version!r}')
        if isinstance(progress, str):
            checks.choice("progress", progress, ("auto",))
        if isinstance(eps, Tensor):
            raise TypeError("eps must be one float for all samples, got a Tensor")
        self.model, self.version, self.parity = model, version, parity or Parity()
        self.norm, self.eps, self.seed = checks.canonical_norm(norm), eps, seed
        if self.parity.reseed and seed is None:
            raise ValueError("parity.reseed needs a seed")
        self.progress = Lines() if progress == "auto" else progress
        common = {"lo": lo, "hi": hi, "output": output, "validate": validate}
        common |= {"norm": self.norm, "eps": eps, "seed": seed}
        self._clean = self._as_is(PGD(steps=0, start="none", **common))
        common["speed"] = speed
        common["compact"] = compact and not self.parity.keep_modes
        self._own = dict(attacks) if isinstance(attacks, Mapping) else None
        self.names = tuple(VERSIONS[version] if attacks is None else attacks)
        if not self.names:
            raise ValueError("attacks must name at least one attack")
        if self._own is None:
            for name in self.names:
                checks.choice("attacks", name, tuple(plan(version, self.norm)))
        self._common, self.plan = common, plan(version, self.norm)
        self.members(_ENOUGH_CLASSES)  # refuses bad settings now

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Adversarial examples for x (B, ...) with labels y (B,); x itself where none was found."""
        return self.run(x, y).x_adv

    def run(
        self, x: Tensor, y: Tensor, *, batch_size: int = 250, state: str | Path | None = None
    ) -> EnsembleResult:
        """All attacks on x (N, ...) in [lo, hi] with labels y (N,).

        Args:
            batch_size: rows that go through the model at once; batches move to the device of its
                parameters.
            state: a file that keeps what was found after each attack and at an interruption; a
                call with the same file goes on from there.
        """
        ensemble = self.ensemble(self.model, batch_size=batch_size, state=state)
        ensemble.attack(x, y)
        found = ensemble.findings
        warn_about(found)
        rows, examples = found.examples()
        x_adv = x.clone()
        if len(rows):
            x_adv[rows.to(x.device)] = examples.to(x.device)
        tables = found.standing, found.prediction, found.broken_by, found.queries, found.gradients
        return EnsembleResult(x_adv, *(t.to(x.device) for t in tables), found.names)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As the authors' package has it: x_adv for x_orig, and with `return_labels` also the
        predicted classes. `state_path` is `state` of `run`."""
        result = self.run(x_orig, y_orig, batch_size=bs, state=state_path)
        return (result.x_adv, result.prediction) if return_labels else result.x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Each attack by itself on all samples that the model classifies correctly: name -> what
        `run_standard_evaluation` returns."""
        return {
            name: self._only(name).run_standard_evaluation(x_orig, y_orig, bs, return_labels)
            for name in self.names
        }

    def members(self, classes: int) -> dict[str, Attack]:
        """The attacks on a model with so many classes, by name, in the order they run."""
        if self._own is not None:
            return dict(self._own)
        return {name: self._member(name, classes, self._common) for name in self.names}

    def ensemble(self, model: Model, **settings: Any) -> Ensemble:
        """The attacks at work on `model`; `settings` as in `Ensemble`."""
        identity = {name: a.describe() for name, a in self.members(_ENOUGH_CLASSES).items()}
        identity["seed"] = str(torch.initial_seed() if self.seed is None else self.seed)
        identity["box"] = f"{self._common['lo']}, {self._common['hi']}"
        return Ensemble(
            model,
            self.names,
            self.members,
            self._clean,
            survivors=True,
            identity={**identity, "parity": str(self.parity)},
            reseed=self.seed if self.parity.reseed else None,
            **{"progress": self.progress, **settings},
        )

    def _only(self, name: str) -> AutoAttack:
        only = copy(self)
        only.names = (name,)
        if self._own is not None:
            only._own = {name: self._own[name]}
        return only

    def _member(self, name: str, classes: int, common: dict[str, Any]) -> Attack:
        parity, m = self.parity, self.plan[name]
        if parity.few_classes and name in ("apgd-t", "fab-t") and classes <= m.targets:
            raise ValueError(f"{name} has {m.targets} targets, the model {classes} classes")
        common = {**common, "restarts": m.restarts}
        searched = {**common, "steps": m.steps}
        gradient = {
            **searched,
            "start": "generator" if parity.reseed else "keyed",
            "grad_mode": "autograd" if parity.autograd else "fused",
            "zero_first_check": parity.zero_first_check,
            "count_held": parity.count_held,
            "multi_eps": m.multi_eps,
            "eot": m.eot,
            "rho": m.rho,
        }
        if name == "apgd-ce":
            attack = APGD(**gradient)
        elif name == "apgd-dlr":
            few = classes < _DLR_CLASSES and not parity.few_classes
            # Of two classes the margin is what is left of the ratio.
            attack = APGD(**gradient, loss="margin" if few else "dlr")
        elif name == "apgd-t":
            attack = TargetedAPGD(**gradient, targets=m.targets)
        elif name == "fab":
            attack = FAB(**searched, early_stop=True)
        elif name == "fab-t":
            attack = TargetedFAB(**searched, targets=m.targets, early_stop=True)
        else:
            draws = "official" if parity.reseed else "keyed"
            attack = Square(**common, queries=m.steps, p=m.p, draws=draws)
        return self._as_is(attack)

    def _as_is(self, attack: GradientAttack) -> GradientAttack:
        if self.parity.keep_modes:
            attack.settings = replace(attack.settings, bn="as_is")
        return attack


def warn_about(found: Findings) -> None:
    """What makes the numbers doubtful, as far as the attacks have seen it."""
    if "square" in found.names and len(found.y):
        alone = (found.broken_by == found.names.index("square")).double().mean().item()
        white_box = any(name != "square" for name in found.names[1:])
        if white_box and alone > _SUSPICIOUS:
            warnings.warn(
                f"Square, which uses no gradients, broke {100 * alone:.1f} % of the samples that "
                "the attacks with gradients could not: the model may mask its gradients "
                "(pyadv.evaluation has checks for that)",
                stacklevel=3,
            )


class Lines:
    """Progress on stderr: one line for each attack, rewritten batch by batch on a terminal; and in
    the file `log`, if there is one."""

    def __init__(self, log: str | Path | None = None):
        self.log = log

    def __call__(self, name: str, done: int, total: int, standing: int) -> None:
        live, last = sys.stderr.isatty(), done == total
        if live or last:
            text = f"{name:<10}{done:>7} / {total}   not broken so far: {standing}"
            end = "\n" if last else ""
            print(("\r" if live else "") + text, end=end, file=sys.stderr, flush=True)
            if last and self.log is not None:
                with open(self.log, "a") as file:
                    print(text, file=file)
