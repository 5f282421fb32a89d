"""How long a suite will take, from a few attack steps on the model and the work of its attacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from pyadv.attacks import FAB, PGD, AutoAttack, Square
from pyadv.attacks.ensemble import AttackLike
from pyadv.engine.attack import Attack
from pyadv.evaluation.evaluate import AUTOATTACKS, SUITES
from pyadv.menus import Norm
from pyadv.passes.borrow import device_of

_FIRST = 8  # samples in the first batch that is timed; later ones are twice as large
_TIMED = 3  # steps
_ENOUGH = 0.1  # seconds for one step, after which no larger batch is timed
_PROBED = 64  # samples whose robustness is looked at


@dataclass(frozen=True)
class Stage:
    """One attack of a suite.

    Attributes:
        steps: steps of each attempt at a sample.
        attempts: attempts at each sample, which run as one batch.
        every: each correctly classified sample costs all steps; otherwise those that withstand the
            attack do, and the others few.
        gradient: its steps need gradients; otherwise forward passes alone.
        weight: cost of a step in such passes.
    """

    steps: int
    attempts: int = 1
    every: bool = False
    gradient: bool = True
    weight: float = 1.0


_FAB = 1.4  # cost of a step of FAB, which adds a forward pass and a projection
# Parts of a suite that are more than a list of attacks.
STAGES: dict[str, tuple[Stage, ...]] = {
    "masking": (Stage(340, every=True), Stage(500, gradient=False)),
    "margins": (
        Stage(100, attempts=9, every=True, weight=_FAB),
        Stage(130, attempts=3, every=True),  # of the bisection, on average
    ),
    "curves": (Stage(188),),
}


class _Ball(TypedDict):
    eps: float
    norm: Norm | float


def _no_model(x: Tensor) -> Tensor:
    raise RuntimeError("the attacks are looked at, not run")


def stages(part: str, eps: float, norm: Norm | float, classes: int) -> tuple[Stage, ...]:
    """Return the attacks of a part of a suite on a model with so many classes."""
    if part in STAGES:
        most = max(classes - 1, 1)
        return tuple(replace(s, attempts=min(s.attempts, most)) for s in STAGES[part])
    ball: _Ball = {"eps": eps, "norm": norm}
    attacks: Mapping[str, AttackLike]
    if part in SUITES:
        attacks = SUITES[part](**ball)
    else:
        attacks = AutoAttack(_no_model, version=AUTOATTACKS[part], **ball).members(classes)
    return tuple(_stage(attack, classes) for attack in attacks.values())


def _stage(attack: Any, classes: int) -> Stage:
    weight = _FAB if isinstance(attack, FAB) else getattr(attack.settings, "eot", 1)
    gradient = not isinstance(attack, Square)
    return Stage(attack.settings.steps, attack.attempts(classes), gradient=gradient, weight=weight)


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass over a batch: `fixed + per_sample * samples`."""

    fixed: float
    per_sample: float

    def of(self, rows: int, steps: float, batch_size: int) -> float:
        """Return the seconds of `steps` passes over so many rows, batch by batch."""
        batches = -(-rows // batch_size)
        return steps * (batches * self.fixed + rows * self.per_sample)


def work(stages: Iterable[Stage], correct: float, robust: float) -> list[tuple[Stage, int]]:
    """Return the stages, and the rows of each: samples times attempts.

    Args:
        correct, robust: how many samples are classified correctly, and withstand a short attack.
    """
    return [(s, round(correct if s.every else robust) * s.attempts) for s in stages]


def estimate(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    samples: Mapping[str, int],
    *,
    eps: float,
    norm: Norm | float = "Linf",
    batch_size: int = 500,
    processes: int = 1,
) -> dict[str, float]:
    """Return the seconds that each part of a suite is expected to take. The true time may be half
    or twice as long: it depends on how many samples each attack leaves.

    Args:
        model: the model; a few steps of attacks on it are timed.
        x, y: the samples, whose first ones are attacked.
        samples: part of a suite -> how many samples it gets.
        eps, norm, batch_size: of the suite.
        processes: how many processes share the samples.
    """
    device = device_of(model, x)

    def first(n: int) -> tuple[Tensor, Tensor]:
        return x[:n].to(device), y[:n].to(device)

    ball: _Ball = {"eps": eps, "norm": norm}
    quick = PGD(model, steps=5, loss="margin", best="fooled", seed=0, **ball)
    looked = first(min(_PROBED, batch_size, len(x)))
    clean = quick.with_(steps=0, start="none").run(*looked)
    correct, robust = (r.correct.float().mean().item() for r in (clean, quick.run(*looked)))

    def cost(attack: Attack) -> Cost:
        return _cost(lambda n: attack.perturb(*first(n)), len(x), batch_size, device)

    costs = [cost(PGD(model, steps=_TIMED, compact=False, seed=0, **ball))]
    if x.dim() == 4:
        costs.append(cost(Square(model, queries=_TIMED, compact=False, seed=0, **ball)))
    seconds = {}
    for part, n in samples.items():
        share = math.ceil(n / processes)
        made = stages(part, eps, norm, clean.logits.shape[1])
        seconds[part] = sum(
            costs[0 if stage.gradient else -1].of(rows, stage.steps, batch_size) * stage.weight
            for stage, rows in work(made, share * correct, share * robust)
        )
    return seconds


def _cost(
    attack: Callable[[int], Any], samples: int, batch_size: int, device: torch.device
) -> Cost:
    """Return the cost of one step of an attack of `_TIMED` steps, from two batch sizes."""
    most = min(samples, batch_size)
    n = min(_FIRST, most)
    attack(n)  # the first call also builds and chooses kernels
    timed = [(n, _seconds(attack, n, device))]
    while timed[-1][1] < _ENOUGH and n < most:
        n = min(2 * n, most)
        timed.append((n, _seconds(attack, n, device)))
    (small, fast), (large, slow) = timed[0], timed[-1]
    if large == small:
        return Cost(0.0, slow / large)
    per_sample = max((slow - fast) / (large - small), 0.0)
    return Cost(max(slow - per_sample * large, 0.0), per_sample)


def _seconds(attack: Callable[[int], Any], n: int, device: torch.device) -> float:
    """Return the seconds of one step."""
    started = time.perf_counter()
    attack(n)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _TIMED
