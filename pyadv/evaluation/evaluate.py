"""Accuracy on clean and on attacked inputs, in batches."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyadv._names import did_you_mean
from pyadv.attacks import APGD, PGD, AutoAttack, PGDPlus
from pyadv.attacks.autoattack import Version, warn_about
from pyadv.attacks.ensemble import SAMPLES, AttackLike, Ensemble, check_attack
from pyadv.attacks.minimum_norm import MinimumNorm
from pyadv.attacks.processes import together
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.engine.attack import Attack, show
from pyadv.engine.results import MinimumNormResult
from pyadv.engine.task import FloatOrTensor, Model
from pyadv.evaluation.report import Report, Row
from pyadv.evaluation.samples import Batches, chunks
from pyadv.menus import Norm

_ENOUGH_CLASSES = 2**31  # for every member of AutoAttack


class _Ball(TypedDict):
    """Arguments that all attacks of a report have."""

    norm: Norm | float
    eps: float
    seed: int | None
    lo: FloatOrTensor | None
    hi: FloatOrTensor | None


class _Work(TypedDict):
    """How an ensemble works."""

    batch_size: int
    state: str | Path | None
    state_name: str | None
    progress: Progress | None


def standard_attacks(
    eps: float,
    norm: Norm | float = "Linf",
    *,
    seed: int | None = 0,
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
) -> dict[str, Attack]:
    """Return the attacks of an evaluation by default, by the name of their row. In Linf and L2 they
    are those that papers on adversarial training tabulate:

    - "PGD-20": 20 steps of eps / 4 on the cross-entropy from a random start (the setting of
      GAIRAT, Zhang et al. 2021).
    - "margin PGD": 40 steps of eps / 4 on max_{j != y} z_j - z_y from a random start. FAT and
      GAIRAT call PGD on this loss "CW"; it is not the attack of Carlini and Wagner (2017). It
      breaks models whose cross-entropy gradient misleads, such as those of reweighted training.

    A sample counts as broken if any iterate fools the model, not the last one alone.

    In L1 they are "APGD" and "margin APGD", 100 steps on the same two losses: plain PGD finds few
    adversarial examples there.
    """
    ball: _Ball = {"norm": norm, "eps": eps, "seed": seed, "lo": lo, "hi": hi}
    if checks.canonical_norm(norm) == "L1":
        return {"APGD": APGD(**ball), "margin APGD": APGD(loss="margin", **ball)}
    alpha = eps / 4
    return {
        "PGD-20": PGD(steps=20, loss="ce", alpha=alpha, best="fooled", **ball),
        "margin PGD": PGD(steps=40, loss="margin", alpha=alpha, best="fooled", **ball),
    }


def _pgd_plus(eps: float, norm: Norm | float, **common: Any) -> dict[str, Attack]:
    return {"PGD+": PGDPlus(eps=eps, norm=norm, **common)}


Suite: TypeAlias = Literal["pgd20", "pgdplus", "autoattack", "autoattack-plus", "autoattack-rand"]
SUITES: dict[str, Callable[..., Mapping[str, AttackLike]]] = {
    "pgd20": standard_attacks,
    "pgdplus": _pgd_plus,
}
AUTOATTACKS: dict[str, Version] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "autoattack-rand": "rand",
}


def is_suite(name: str) -> TypeGuard[Suite]:
    """Return whether `evaluate` knows attacks by this name."""
    return name in SUITES | AUTOATTACKS


def evaluate(
    model: Callable[..., Any],
    data: Tensor | np.ndarray | Batches | Dataset[Any],
    y: Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    eps: float,
    norm: Norm | float = "Linf",
    attacks: Suite | Mapping[str, AttackLike] | AutoAttack | AttackLike = "pgd20",
    batch_size: int = 500,
    seed: int | None = 0,
    lo: FloatOrTensor | None = 0.0,
    hi: FloatOrTensor | None = 1.0,
    chunk: int = 4096,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
) -> Report:
    """Measure the accuracy of `model` on the samples, clean and under each attack.

    The model is evaluated in eval mode and gets its modes back; batches move to the device of its
    parameters. Random starts are keyed by the sample's values, so the result depends neither on
    `batch_size` nor on the order of the samples. Samples with equal values and equal labels are
    attacked once and counted as often as they are given.

    Where torch.distributed is initialised, all processes of the group must make this call with all
    samples, not with a part each. They divide the samples among themselves, anew for each attack,
    and all return the same report, with the verdicts of a single process.

    A report is about one norm, radius and box, and about any other class than the label. Attacks of
    this library that search elsewhere are refused: those of another norm, eps or box, and targeted
    ones. A minimum-norm attack without an eps is judged at that of the report: a sample counts as
    broken if the nearest point found lies within eps. Other attacks are taken as they are.

    Args:
        model: maps (B, ...) to logits (B, C).
        data: (N, ...) inputs in [lo, hi], with `y`, as a tensor or NumPy array; or batches, as a
            DataLoader gives them: (x, y), or a dict with one entry of images and one of labels; or
            a Dataset of samples (x, label).
        y: (N,) integer labels of `data`: tensor, NumPy array or list.
        eps: radius of the ball, in units of x.
        norm: "Linf", "L2" or "L1".
        attacks: "pgd20" (`standard_attacks`), "pgdplus" (PGD+: 5 restarts of 40 steps),
            "autoattack", "autoattack-plus", "autoattack-rand"; row name -> attack; an `AutoAttack`;
            or one attack. AutoAttack gives each attack the samples that no earlier one has broken;
            otherwise each attack gets all samples. An attack of your own has the verdict of its
            own result, so a PGD should have best="fooled".
        batch_size: rows that go through the model at once, >= 1.
        seed: seed of the random starts of the named attacks.
        lo, hi: the box inputs lie in, for inputs that are normalised for example: float, None for
            no bound, or tensor that broadcasts to x, such as (1, C, 1, 1).
        chunk: samples of `data` batches held in memory at a time; survivors are packed within it.
        state: a file that keeps what was found after each attack and at an interruption. A call
            with the same file continues from there, also with more, fewer or reordered samples; the
            report covers exactly the samples given. Another model or other attacks are refused.
        state_name: a name for the model and the losses where these are lambdas or local functions,
            which have no identity that the state can be compared by.
        progress: "auto" prints to stderr; None is silent; or a callable (row name, samples done,
            samples the attack gets, samples no attack has broken so far). With several processes
            the first one prints, and a callable gets the counts of its process.
        group: the process group to share the work with; by default that of torch.distributed if it
            is initialised, unless FSDP shards the model (all processes then evaluate all samples).
            False: this process alone, whatever the others do.

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), for settings, for attacks that do
            not fit the report, for a state made with another model or other attacks; for models,
            samples or settings that differ between the processes; and whatever an attack refuses
            (labels out of range, NaN, inputs outside the box).
        ProcessFailed: if the evaluation failed in another process.
    """
    with together(model, group) as processes:
        where, chosen = _chosen(model, attacks, eps, norm, seed, lo, hi)
        return run_attacks(
            model,
            data,
            y,
            where,
            chosen,
            batch_size=batch_size,
            chunk=chunk,
            state=state,
            state_name=state_name,
            progress=progress,
            group=processes,
        )


def _chosen(
    model: Callable[..., Any],
    attacks: Suite | Mapping[str, AttackLike] | AutoAttack | AttackLike,
    eps: float,
    norm: Norm | float,
    seed: int | None,
    lo: FloatOrTensor | None,
    hi: FloatOrTensor | None,
) -> tuple[Heading, Mapping[str, AttackLike] | AutoAttack]:
    """Return what the report is about and the attacks, which fit it. Arguments and errors are those
    of `evaluate`."""
    eps = _one_radius(eps)
    where = Heading(checks.canonical_norm(norm), float(eps), lo, hi)
    if isinstance(attacks, str):
        if not is_suite(attacks):
            known = ", ".join(SUITES | AUTOATTACKS)
            raise ValueError(
                f"attacks must be one of {known}, or attacks by name, got {attacks!r}"
                f"{did_you_mean(attacks, SUITES | AUTOATTACKS)}"
            )
        ball: _Ball = {"norm": where.norm, "eps": eps, "seed": seed, "lo": lo, "hi": hi}
        if attacks in AUTOATTACKS:
            return where, AutoAttack(model, version=AUTOATTACKS[attacks], **ball)
        return where, SUITES[attacks](**ball)
    if isinstance(attacks, AutoAttack):
        where.check("AutoAttack", attacks)
        for name, attack in attacks.members(_ENOUGH_CLASSES).items():
            where.check(name, attack)
            if _has_no_radius(attack):
                raise ValueError(
                    f"attacks in an AutoAttack must have an eps, but {name!r} has none"
                )
        return where, attacks
    return where, {name: where.fitting(name, a) for name, a in _by_name(attacks).items()}


@dataclass(frozen=True)
class Heading:
    """What a report is about, which its attacks must fit."""

    norm: Norm
    eps: float
    lo: FloatOrTensor | None
    hi: FloatOrTensor | None

    def fitting(self, name: str, attack: AttackLike) -> AttackLike:
        """Return the attack, one without a radius judged at that of the report. Raise ValueError if
        it searches elsewhere."""
        self.check(name, attack)
        return Within(attack, self.eps) if _has_no_radius(attack) else attack

    def check(self, name: str, attack: Any) -> None:
        """Raise ValueError if an attack of ours does not fit the report."""
        if not isinstance(attack, (Attack, AutoAttack)):
            return
        for what in ("norm", "eps", "lo", "hi"):
            value, mine = getattr(attack, what), getattr(self, what)
            free = what == "eps" and _has_no_radius(attack)
            if not (free or _equal(value, mine)):
                raise ValueError(
                    f"attacks must have the {what} of the report, {show(mine)}, but {name!r} has "
                    f"{what}={show(value)}"
                )
        if isinstance(attack, Attack) and attack.targeted:
            raise ValueError(
                f"attacks must not be targeted in a report on untargeted accuracy, but {name!r} is"
            )


def _has_no_radius(attack: Any) -> TypeGuard[MinimumNorm]:
    return isinstance(attack, MinimumNorm) and attack.eps is None


def _equal(a: Any, b: Any) -> bool:
    """Return whether two radii, bounds or names are the same up to float32 rounding."""
    if isinstance(a, str) or a is None or b is None:
        return a == b
    a, b = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (a, b))
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    return torch.allclose(a, b, rtol=1e-6, atol=0.0)


@dataclass(frozen=True)
class Within:
    """A minimum-norm attack that is judged at a radius: samples whose nearest point found lies
    farther away count as correct."""

    attack: MinimumNorm
    eps: float

    @property
    def draw(self) -> int:
        return self.attack.draw

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> MinimumNormResult:
        """Run the attack. Arguments as in `PGD.run`."""
        result = self.attack.run(x, y, ids, draw, model)
        result.correct |= result.distances > self.eps
        return result

    def attempts(self, classes: int) -> int:
        return self.attack.attempts(classes)

    def describe(self) -> str:
        """Return one line that lets a reader repeat the attack."""
        return f"{self.attack.describe()}, within {show(self.eps)}"


def run_attacks(
    model: Callable[..., Any],
    data: Tensor | np.ndarray | Batches | Dataset[Any],
    y: Tensor | np.ndarray | Sequence[int] | None,
    where: Heading,
    attacks: Mapping[str, AttackLike] | AutoAttack,
    *,
    batch_size: int,
    chunk: int = 4096,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
) -> Report:
    """Return the report of these attacks, whether or not they fit its heading `where`. Other
    arguments as in `evaluate`."""
    with together(model, group) as processes:
        work: _Work = {
            "batch_size": batch_size,
            "state": state,
            "state_name": state_name,
            "progress": processes.progress(progress),
        }
        # No steps from no start: the clean prediction, under the same rules and by the same code.
        clean = PGD(
            norm=where.norm, eps=where.eps, lo=where.lo, hi=where.hi, steps=0, start="none", seed=0
        )
        if isinstance(attacks, AutoAttack):
            members: Callable[[int], Mapping[str, AttackLike]] = attacks.members
            ensemble = attacks.ensemble(model, processes, **work)
        else:
            own = dict(attacks)

            def given(classes: int) -> dict[str, AttackLike]:
                return own

            members = given
            ensemble = Ensemble(
                model,
                tuple(own),
                members,
                clean,
                survivors=False,
                described=own,
                processes=processes,
                **work,
            )
        for x, labels in chunks(data, y, chunk, batch_size):
            ensemble.attack(x, labels)
        found = ensemble.findings
        # Batches may end earlier in one process, which the chunks before cannot tell.
        processes.compare(SAMPLES, {"number of samples": len(found.y)})
        if not len(found.y):
            raise ValueError("data must hold at least one sample, got none")
    warn_about(found)
    descriptions = {name: a.describe() for name, a in members(found.classes).items()}
    rows = tuple(
        Row(
            name,
            descriptions.get(name, "no attack"),
            # x lies in the ball, so a sample that is wrong without an attack is not robust.
            ~found.broken[:, range(k + 1) if ensemble.survivors else [0, k]].any(1),
            found.queries[:, k],
            found.gradients[:, k],
            found.non_finite[:, k],
        )
        for k, name in enumerate(found.names)
    )
    notes = tuple(ensemble.notes)
    return Report(len(found.y), where.norm, where.eps, rows, found, notes)


def _one_radius(eps: Any) -> float:
    """Return eps as a float. Raise an error unless it is one finite number >= 0."""
    single = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not single and not (isinstance(eps, (Tensor, np.ndarray)) and eps.ndim == 0):
        several = isinstance(eps, (list, tuple, Tensor, np.ndarray))
        more = "; call evaluate once for each radius, or accuracy_curves" if several else ""
        raise TypeError(
            "eps must be one number, the radius that the report is about, got a "
            f"{type(eps).__name__}{more}"
        )
    eps = float(eps)
    checks.size("eps", eps)
    return eps


def _by_name(attacks: Mapping[str, AttackLike] | AttackLike) -> dict[str, AttackLike]:
    """Return the attacks of one's own by name; a single one has the name of its class."""
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif hasattr(attacks, "run"):
        named = {type(attacks).__name__: attacks}
    else:
        raise TypeError(
            f"attacks must be one of {', '.join(SUITES | AUTOATTACKS)}, a mapping from names to "
            f"attacks, an AutoAttack or one attack, got {type(attacks).__name__}"
        )
    for name, attack in named.items():
        if not isinstance(name, str):
            raise TypeError(f"attacks must have strings as names, got {name!r}")
        check_attack(name, attack)
    return named
