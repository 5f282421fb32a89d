"""How do the costs grow with the batch, the classes, the image, the steps and the restarts?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ops as ops_question
import problems
import torch
from attacks import eager_pgd
from harness import Case, Options, Provider
from problems import ALPHA, EPS
from torch import Tensor

TITLE = "Scaling"
LAYOUT = "matrix"


def cases(options: Options) -> Iterator[Case]:
    quick = options.quick
    for rows in (8, 64) if quick else (8, 64, 512, 4096, 32768):
        yield _loss("attack_loss, rows (10 classes)", (rows, 10), rows, options)
    for classes in (10, 100) if quick else (10, 100, 1000, 10_000, 50_000):
        yield _loss("attack_loss, classes (64 rows)", (64, classes), classes, options)
    for side in (8, 16) if quick else (8, 28, 64, 128, 224, 384):
        yield _image(side, options)
    for batch in (2, 4) if quick else (8, 32, 128, 512):
        yield _attack("PGD-10 on SmallCNN, batch", batch, options, batch, options.steps)
    for steps in (1, 2) if quick else (1, 5, 10, 20, 50):
        yield _attack("PGD on SmallCNN, steps (batch 32)", steps, options, 32, steps)
    for restarts in (1, 2) if quick else (1, 2, 5, 10):
        yield _restarts(restarts, options)


def _curve(series: str, at: float, calls: dict[str, Any], **settings: Any) -> Case:
    return Case(
        f"{series}: {at:g}",
        calls,
        group=series,
        series=series,
        at=at,
        budget_s=3.0,
        peak=False,
        **settings,
    )


def _loss(series: str, shape: tuple[int, int], at: float, options: Options) -> Case:
    case = ops_question.attack_loss_case(shape, torch.float32, options, compiled=False)
    return _curve(series, at, case.providers, check=case.check, images=shape[0])


def _image(side: int, options: Options) -> Case:
    case = ops_question.linf_case((32, 3, side, side), torch.float32, options, compiled=False)
    keep = {k: v for k, v in case.providers.items() if k in ("pyadv", "eager", "copy_")}
    return _curve("linf_step, side of the image (batch 32)", side, keep, check=case.check)


def _attack(series: str, at: int, options: Options, batch: int, steps: int) -> Case:
    from pyadv.attacks import PGD

    _, model, x, y, eps, alpha = problems.small_cnn(options, batch)
    attack = PGD(model, eps=eps, alpha=alpha, steps=steps, start="none")
    calls = {
        "pyadv": lambda: attack(x, y),
        "floor": Provider(problems.floor(model, x, steps), yardstick=True),
        "eager": lambda: eager_pgd(model, x, y, eps, alpha, steps),
    }
    return _curve(series, at, calls, images=len(x), steps=steps)


def _restarts(n: int, options: Options) -> Case:
    """Compare all restarts in one batch with one restart after the other."""
    from pyadv.attacks import PGD

    _, model, x, y, _, _ = problems.small_cnn(options, 32)
    settings: dict[str, Any] = dict(eps=EPS, alpha=ALPHA, steps=options.steps, seed=0)
    together, single = PGD(model, restarts=n, **settings), PGD(model, **settings)

    def alone() -> Callable[[], list[Tensor]]:
        return lambda: [single.run(x, y, draw=i).x_adv for i in range(n)]

    calls = {"pyadv": lambda: together.run(x, y), "one after the other": alone()}
    return _curve("PGD-10 on SmallCNN, restarts (batch 32)", n, calls, images=len(x))
