"""AutoAttack (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
Diverse Parameter-free Attacks", ICML 2020): several attacks in turn, each on the samples that no
earlier one has broken."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from pyadv.attacks.apgd import APGD, TargetedAPGD
from pyadv.attacks.ensemble import AttackLike, Ensemble, Findings, check_attack
from pyadv.attacks.fab import FAB, TargetedFAB
from pyadv.attacks.pgd import PGD
from pyadv.attacks.processes import ALONE, Processes, together
from pyadv.attacks.progress import Progress
from pyadv.attacks.square import Draws, Square
from pyadv.engine import checks
from pyadv.engine.attack import Attack, Model, show
from pyadv.engine.results import passes_line, samples_line
from pyadv.engine.settable import Settable
from pyadv.engine.task import FloatOrTensor, radius
from pyadv.menus import AnyNorm, Auto, Norm, Speed
from pyadv.passes.borrow import Output

Version: TypeAlias = Literal["standard", "plus", "rand", "custom"]
VERSIONS: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_DLR_CLASSES = 3  # the difference of logits ratio compares this many
_ENOUGH_CLASSES = 2**31  # for every member, until the model's number of classes is known
_SUSPICIOUS = 0.002  # share of samples that only Square breaks (the authors' threshold)


@dataclass(frozen=True)
class Parity:
    """Faults of the authors' code to repeat, for comparison with published numbers. Each is off by
    default; `Parity.all()` turns all of them on.

    Attributes:
        zero_first_check: APGD compares its first loss with 0 instead of the loss at the start.
        reseed: call `torch.manual_seed(seed)` before each batch of each attack, and draw all noise
            from torch's generator; Square's positions are then shared by the batch. The generator
            is not put back, and results depend on the batches.
        autograd: compute losses as plain expressions, with their rounding: at margins beyond 17
            half of the float32 gradient of the cross-entropy is lost.
        keep_modes: attack a model in train mode as it is, so that its BatchNorm statistics move.
        count_held: L1-APGD spends its share of coordinates also on those that the box lets no
            further.
        few_classes: refuse models with fewer classes than an attack has targets (the authors' code
            raises an IndexError), and two classes with the difference of logits ratio.
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
    """Settings of one member of AutoAttack; each attack reads the ones it has."""

    steps: int = 100  # for Square, queries
    restarts: int = 1
    targets: int = 9
    eot: int = 1
    rho: float = 0.75
    multi_eps: bool = False
    p: float = 0.8


def plan(version: Version, norm: AnyNorm) -> dict[str, Member]:
    """Return the settings of the members; those for L1 come from "Mind the Box" (ICML 2021)."""
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


@dataclass(repr=False)
class EnsembleResult:
    """What AutoAttack found, one row per sample.

    Attributes:
        x_adv: adversarial examples; x itself where no attack succeeded.
        correct: (B,) bool: the model classifies x as y and no attack succeeded.
        prediction: (B,) class of x_adv.
        broken_by: (B,) position in `names` of the first attack that broke the sample, 0 for the
            clean prediction, -1 for none.
        queries, gradients: (B, len(names)) forward and backward passes.
        names: "clean" and the attacks' names.
        notes: remarks that a reader of the numbers needs.
    """

    x_adv: Tensor
    correct: Tensor
    prediction: Tensor
    broken_by: Tensor
    queries: Tensor
    gradients: Tensor
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def robust_accuracy(self) -> float:
        """The share of samples that no attack broke."""
        return self.correct.float().mean().item()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {samples_line(self.x_adv)}"]
        left = int(self.correct.sum())
        lines.append(f"not broken: {left:,} ({100 * self.robust_accuracy:.2f} %)")
        counts = [
            f"{name} {int((self.broken_by == k).sum()):,}"
            for k, name in enumerate(self.names[1:], 1)
        ]
        lines.append(
            f"misclassified without an attack: {int((self.broken_by == 0).sum()):,}; broken by "
            + ", ".join(counts)
        )
        lines.append(passes_line(self.queries.sum(1), self.gradients.sum(1)))
        return "\n".join([*lines, *self.notes])


class AutoAttack(Settable):
    """AutoAttack with the attacks, step counts, restarts and targets of the authors' package.

    - "standard": APGD-CE, APGD-T with 9 targets, FAB-T with 9 targets, Square with 5000 queries. In
      L1 APGD-CE has 5 restarts, APGD-T 5 targets, and both the schedule of radii.
    - "plus": APGD-CE, APGD-DLR and FAB with 5 restarts, Square, APGD-T, FAB-T.
    - "rand": APGD-CE and APGD-DLR with 20 gradients per step, for random models.
    - "custom": the members named in `attacks`, with the settings of "standard", or your own
      attacks.

    `plan`, name -> `Member`, holds the settings of the members and may be changed before a run.

    Each attack gets the samples that no earlier one has broken, packed into full batches; a sample
    leaves a batch as soon as it is broken. Random numbers are a function of seed and sample, so
    verdicts do not depend on batches, order or processes. Samples with equal values and equal
    labels are attacked once.

    Args:
        model: anything that maps x to logits (B, C).
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x. The default, 8/255, is for Linf.
        version: "standard", "plus", "rand" or "custom".
        attacks: with "custom" only: names out of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, in
            the order they run; a mapping from names to attacks (`PGD(...)`, ...); or one name or
            attack.
        seed: seed of the keyed noise; torch.initial_seed() by default.
        lo, hi: bounds of the box that inputs lie in.
        progress: "auto" prints one line per attack to stderr, and on a terminal one per batch;
            None is silent; or a callable (attack, samples done, samples it gets, samples standing).
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
        norm: Norm | float = "Linf",
        eps: float | None = None,
        version: Version = "standard",
        attacks: Sequence[str] | Mapping[str, AttackLike] | AttackLike | None = None,
        seed: int | None = None,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        compact: bool = True,
        output: Output = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
        progress: Progress | Literal["auto"] | None = "auto",
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
        self.norm, self.seed = checks.canonical_norm(norm), seed
        self.eps = eps = radius(eps, self.norm)
        self.lo, self.hi = lo, hi
        if self.parity.reseed and seed is None:
            raise ValueError("parity.reseed needs a seed")
        self.progress = progress
        common: dict[str, Any] = {"lo": lo, "hi": hi, "output": output, "validate": validate}
        common |= {"norm": self.norm, "eps": eps, "seed": seed}
        self._clean = self._as_is(PGD(steps=0, start="none", **common))
        common["speed"] = speed
        common["compact"] = compact and not self.parity.keep_modes
        if isinstance(attacks, str):
            attacks = (attacks,)
        elif hasattr(attacks, "run"):
            one: Any = attacks  # `check_attack` looks at it below
            attacks = {type(one).__name__: one}
        self._own = dict(attacks) if isinstance(attacks, Mapping) else None
        if not isinstance(attacks, (Sequence, Mapping, type(None))):
            raise TypeError(
                "attacks must be names, a mapping from names to attacks, or one attack, got "
                f"{type(attacks).__name__}"
            )
        self.names = tuple(VERSIONS[version] if attacks is None else attacks)
        if not self.names:
            raise ValueError("attacks must name at least one attack")
        for name, attack in (self._own or {}).items():
            check_attack(name, attack)
        if self._own is None:
            for name in self.names:
                checks.choice("attacks", name, tuple(plan(version, self.norm)))
        self._common, self.plan = common, plan(version, self.norm)
        self.members(_ENOUGH_CLASSES)  # refuses bad settings now

    def __repr__(self) -> str:
        members = self.members(_ENOUGH_CLASSES).items()
        lines = [f"AutoAttack ({self.version}), {self.norm} {show(self.eps)}"]
        return "\n".join(lines + [f"{name:<10}{attack.describe()}" for name, attack in members])

    def __copy__(self) -> AutoAttack:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__["plan"] = {name: replace(member) for name, member in self.plan.items()}
        return new

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial examples for x (B, ...) with labels y (B,); x itself where none was
        found."""
        return self.run(x, y).x_adv

    def run(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int = 250,
        state: str | Path | None = None,
        state_name: str | None = None,
        group: Any = None,
    ) -> EnsembleResult:
        """Run all attacks on x (N, ...) in [lo, hi] with labels y (N,).

        Where torch.distributed is initialised, all processes of the group must make this call with
        all samples. They divide the samples among themselves, anew for each attack, and all return
        the same result.

        Args:
            batch_size: rows that go through the model at once; batches move to the device of its
                parameters.
            state: a file that keeps what was found after each attack and at an interruption. A call
                with the same file continues from there, also with other samples or another order;
                another model or other settings are refused.
            state_name: a name for the model and the losses where these are lambdas or local
                functions, which have no identity that the state can be compared by.
            group: as in `evaluate`.
        """
        with together(self.model, group) as processes:
            ensemble = self.ensemble(
                self.model,
                processes,
                batch_size=batch_size,
                state=state,
                state_name=state_name,
                progress=self._shown(len(x), processes),
            )
            ensemble.attack(x, y)
        found = ensemble.findings
        warn_about(found)
        rows, examples = found.examples()
        x_adv = x.clone()
        if len(rows):
            x_adv[rows.to(x.device)] = examples.to(x.device)
        return EnsembleResult(
            x_adv,
            correct=found.standing.to(x.device),
            prediction=found.prediction.to(x.device),
            broken_by=found.broken_by.to(x.device),
            queries=found.queries.to(x.device),
            gradients=found.gradients.to(x.device),
            names=found.names,
            notes=tuple(ensemble.notes),
        )

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        state_name: str | None = None,
        group: Any = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what the authors' package returns: x_adv for x_orig, and with `return_labels` also
        the predicted classes.

        `state_path`, `state_name` and `group` are `state`, `state_name` and `group` of `run`. By
        default this process works alone, as with the authors' package.
        """
        result = self.run(
            x_orig,
            y_orig,
            batch_size=bs,
            state=state_path,
            state_name=state_name,
            group=group,
        )
        return (result.x_adv, result.prediction) if return_labels else result.x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Run each attack by itself on all samples that the model classifies correctly; return what
        `run_standard_evaluation` returns, by name."""
        return {
            name: self._only(name).run_standard_evaluation(x_orig, y_orig, bs, return_labels)
            for name in self.names
        }

    def members(self, classes: int) -> dict[str, AttackLike]:
        """Return the attacks on a model with this many classes, by name, in the order they run."""
        if self._own is not None:
            return dict(self._own)
        return {name: self._member(name, classes, self._common) for name in self.names}

    def ensemble(self, model: Model, processes: Processes = ALONE, **settings: Any) -> Ensemble:
        """Return the ensemble that attacks `model`; `settings` as in `Ensemble`."""
        return Ensemble(
            model,
            self.names,
            self.members,
            self._clean,
            survivors=True,
            identity={"parity": self.parity},
            described=self.members(_ENOUGH_CLASSES),
            reseed=self.seed if self.parity.reseed else None,
            as_is=self.parity.keep_modes,
            processes=processes,
            **{"progress": self._shown(None, processes), **settings},
        )

    def _shown(self, samples: int | None, processes: Processes) -> Progress | None:
        """Return what is called with the progress of one run."""
        return processes.progress(self.progress, samples)

    def _only(self, name: str) -> AutoAttack:
        only = copy(self)
        only.names = (name,)
        if self._own is not None:
            only._own = {name: self._own[name]}
        return only

    def _member(self, name: str, classes: int, common: dict[str, Any]) -> AttackLike:
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
        attack: Attack
        if name == "apgd-ce":
            attack = APGD(**gradient)
        elif name == "apgd-dlr":
            few = classes < _DLR_CLASSES and not parity.few_classes
            # With two classes the margin is all that remains of the ratio.
            attack = APGD(**gradient, loss="margin" if few else "dlr")
        elif name == "apgd-t":
            attack = TargetedAPGD(**gradient, targets=m.targets)
        elif name == "fab":
            attack = FAB(**searched, early_stop=True)
        elif name == "fab-t":
            attack = TargetedFAB(**searched, targets=m.targets, early_stop=True)
        else:
            draws: Draws = "official" if parity.reseed else "keyed"
            attack = Square(**common, queries=m.steps, p=m.p, draws=draws)
        return self._as_is(attack)

    def _as_is(self, attack: Attack) -> Attack:
        if self.parity.keep_modes:
            attack.settings = replace(attack.settings, bn="as_is")
        return attack


def warn_about(found: Findings) -> None:
    """Warn if Square broke samples that the attacks by gradient could not."""
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
