"""Robust accuracy as a function of the radius and of the number of steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pyadv.attacks import PGD
from pyadv.attacks.ensemble import CLEAN
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.evaluation.evaluate import Heading, run_attacks
from pyadv.menus import Norm

FACTORS = (0.25, 0.5, 0.75, 1.5, 2.0)  # radii, as multiples of eps
STEPS = (1, 2, 5, 10, 20, 50)
_USUAL = 20  # steps at every radius

Curves = dict[str, list[tuple[float, float]]]


def accuracy_curves(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm | float = "Linf",
    batch_size: int = 500,
    seed: int | None = 0,
    state: str | Path | None = None,
    state_name: str | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
    group: Any = None,
) -> Curves:
    """Measure accuracy under PGD on the margin loss from a random start, at the first iterate that
    fools the model. Steps follow the radius and their number, see `step_size`.

    Arguments and errors are those of `evaluate`. The cost is 188 steps per sample.

    Returns:
        "eps": (radius, accuracy in [0, 1]) for radii from 0 to 2 eps and 20 steps; "steps": (steps,
        accuracy) for 0 to 50 steps at radius eps. The first pair of each is the clean accuracy.
    """

    def attack(radius: float, steps: int) -> PGD:
        return PGD(
            norm=norm,
            eps=radius,
            steps=steps,
            loss="margin",
            best="fooled",
            seed=seed,
        )

    radii = {factor: f"eps {factor * eps:.4g}" for factor in FACTORS}
    lengths = {steps: f"{steps} steps" for steps in STEPS}
    attacks = {name: attack(factor * eps, _USUAL) for factor, name in radii.items()}
    attacks |= {name: attack(eps, steps) for steps, name in lengths.items()}
    report = run_attacks(
        model,
        x,
        y,
        Heading(checks.canonical_norm(norm), float(eps), 0.0, 1.0),
        attacks,
        batch_size=batch_size,
        state=state,
        state_name=state_name,
        progress=progress,
        group=group,
    )
    accuracy = {row.name: row.accuracy for row in report.rows}
    named = {factor * eps: accuracy[name] for factor, name in radii.items()}
    named |= {0.0: accuracy[CLEAN], float(eps): accuracy[lengths[_USUAL]]}
    by_steps = [(float(steps), accuracy[name]) for steps, name in lengths.items()]
    return {"eps": sorted(named.items()), "steps": [(0.0, accuracy[CLEAN]), *by_steps]}
