"""Accuracy on clean and on attacked inputs, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks import PGD, AutoAttack, PGDPlus
from pyadv.attacks.autoattack import warn_about
from pyadv.attacks.ensemble import AttackLike, Ensemble, check_attack
from pyadv.attacks.progress import Lines, Progress
from pyadv.engine import checks
from pyadv.evaluation.report import Report, Row

Batches = Iterable[tuple[Tensor, Tensor]]


def standard_attacks(
    eps: float, norm: str | float = "Linf", *, seed: int | None = 0
) -> dict[str, PGD]:
    """Return the attacks that papers on adversarial training tabulate, by the name of their row.

    - "PGD-20": 20 steps of eps / 4 on the cross-entropy from a random start (the setting of
      GAIRAT, Zhang et al. 2021).
    - "margin PGD": 40 steps of eps / 4 on max_{j != y} z_j - z_y from a random start. FAT and
      GAIRAT call PGD on this loss "CW"; it is not the attack of Carlini and Wagner (2017). It
      breaks models whose cross-entropy gradient misleads, such as those of reweighted training.
    """
    settings = {"norm": norm, "eps": eps, "alpha": eps / 4, "seed": seed}
    return {
        "PGD-20": PGD(steps=20, loss="ce", **settings),
        "margin PGD": PGD(steps=40, loss="margin", **settings),
    }


def _pgd_plus(eps: float, norm: str | float, *, seed: int | None) -> dict[str, PGD]:
    return {"PGD+": PGDPlus(eps=eps, alpha=eps * 10 / 31, norm=norm, seed=seed)}


SUITES: dict[str, Callable[..., dict[str, AttackLike]]] = {
    "pgd20": standard_attacks,
    "pgdplus": _pgd_plus,
}
AUTOATTACKS = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}


def evaluate(
    model: Callable[..., Any],
    data: Tensor | Batches,
    y: Tensor | None = None,
    *,
    eps: float,
    norm: str | float = "Linf",
    attacks: str | Mapping[str, AttackLike] | AutoAttack | AttackLike = "pgd20",
    batch_size: int = 500,
    seed: int | None = 0,
    chunk: int = 4096,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | str | None = "auto",
) -> Report:
    """Measure the accuracy of `model` on the samples, clean and under each attack.

    The model is evaluated in eval mode and gets its modes back; batches move to the device of its
    parameters. Random starts are keyed by the sample's values, so the result depends neither on
    `batch_size` nor on the order of the samples. Samples with equal values and equal labels are
    attacked once and counted as often as they are given.

    Args:
        model: maps (B, ...) to logits (B, C).
        data: (N, ...) inputs in [0, 1], with `y`; or batches (x, y), from a DataLoader for example.
        y: (N,) int64 labels of `data`.
        eps: radius of the ball, in units of x.
        norm: "Linf", "L2" or "L1".
        attacks: "pgd20" (`standard_attacks`), "pgdplus" (PGD+: 5 restarts of 40 steps),
            "autoattack", "autoattack-plus", "autoattack-rand"; row name -> attack; an `AutoAttack`;
            or one attack. AutoAttack gives each attack the samples that no earlier one has broken;
            otherwise each attack gets all samples.
        batch_size: rows that go through the model at once, >= 1.
        seed: seed of the random starts of the named attacks.
        chunk: samples of `data` batches held in memory at a time; survivors are packed within it.
        state: a file that keeps what was found after each attack and at an interruption. A call
            with the same file continues from there, also with more, fewer or reordered samples; the
            report covers exactly the samples given. Another model or other attacks are refused.
        state_name: a name for the model and the losses where these are lambdas or local functions,
            which have no identity that the state can be compared by.
        progress: "auto" prints to stderr; None is silent; or a callable (row name, samples done,
            samples the attack gets, samples no attack has broken so far).

    Raises:
        ValueError, TypeError: for an empty or mismatched (x, y), for settings, for a state made
            with another model or other attacks; and whatever an attack refuses (labels out of
            range, NaN, inputs outside the box).
    """
    settings = {
        "batch_size": batch_size,
        "state": state,
        "state_name": state_name,
        "progress": Lines() if progress == "auto" else progress,
    }
    if isinstance(attacks, str):
        if attacks not in SUITES | AUTOATTACKS:
            known = ", ".join(SUITES | AUTOATTACKS)
            raise ValueError(f"attacks must be one of {known}, or attacks by name, got {attacks!r}")
        if attacks in AUTOATTACKS:
            version = AUTOATTACKS[attacks]
            attacks = AutoAttack(model, norm=norm, eps=eps, version=version, seed=seed)
        else:
            attacks = SUITES[attacks](eps, norm, seed=seed)
    # No steps from no start: the clean prediction, under the same rules and by the same code.
    clean = PGD(norm=norm, eps=eps, steps=0, start="none", seed=0)
    if isinstance(attacks, AutoAttack):
        theirs, ours = (attacks.norm, attacks.eps), (clean.settings.norm, eps)
        if theirs != ours:
            raise ValueError(
                f"norm and eps must be those of attacks, {theirs[0]} and {theirs[1]}, "
                f"got {ours[0]} and {ours[1]}"
            )
        members = attacks.members
        ensemble = attacks.ensemble(model, **settings)
    else:
        own = _by_name(attacks)

        def members(classes: int) -> dict[str, AttackLike]:
            return own

        ensemble = Ensemble(
            model, tuple(own), members, clean, survivors=False, described=own, **settings
        )
    for x, labels in _chunks(data, y, chunk):
        ensemble.attack(x, labels)
    found = ensemble.findings
    if not len(found.y):
        raise ValueError("data must hold at least one sample, got none")
    warn_about(found)
    descriptions = {name: a.describe() for name, a in members(found.classes).items()}
    rows = tuple(
        Row(
            name,
            descriptions.get(name, "no attack"),
            ~(found.broken[:, : k + 1].any(1) if ensemble.survivors else found.broken[:, k]),
            found.queries[:, k],
            found.gradients[:, k],
            found.non_finite[:, k],
        )
        for k, name in enumerate(found.names)
    )
    notes = tuple(ensemble.notes)
    return Report(len(found.y), clean.settings.norm, float(eps), rows, found, notes)


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


def _chunks(data: Tensor | Batches, y: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the samples in chunks of at least `size`, the last one excepted; a tensor is one
    chunk."""
    if isinstance(data, Tensor):
        if y is not None and not isinstance(y, Tensor):
            raise TypeError(f"y must be an int64 tensor, got {type(y).__name__}")
        if y is None or data.dim() == 0 or len(data) == 0 or y.shape != data.shape[:1]:
            n = len(data) if data.dim() else 0
            raise ValueError(
                f"y must be (N,) for N = {n} >= 1 samples of data, got "
                f"{None if y is None else list(y.shape)}"
            )
        yield data, y
        return
    if y is not None:
        raise ValueError("y belongs to data given as a tensor; batches carry their labels")
    if size < 1:
        raise ValueError(f"chunk must be >= 1, got {size}")
    held: list[tuple[Tensor, Tensor]] = []
    for batch in data:
        pair = isinstance(batch, (tuple, list)) and len(batch) >= 2
        if not pair or not all(isinstance(part, Tensor) for part in batch[:2]):
            kinds = [type(part).__name__ for part in batch[:2]] if pair else type(batch).__name__
            raise TypeError(f"data must be a tensor or give batches (x, y) of tensors, got {kinds}")
        checks.batch(*batch[:2], None)
        held.append((batch[0], batch[1]))
        if sum(len(labels) for _, labels in held) >= size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)
