"""What does an evaluation by AutoAttack cost, and are the verdicts the same?

The network is a SmallCNN, trained adversarially on the embedded images. `pyautoattack` is the
authors' code. torchattacks' class of that name runs 10 iterations of each attack instead of the
authors' 100, so it is a different and weaker ensemble; the other peers have none. The floor makes
as many bare passes as pyadv, in full batches. "differs" counts the samples whose verdict is not
that of the authors' code. Both draw their own random numbers, so a few verdicts may differ.

The cases of single members show where the time beyond the floor goes. A query of Square costs about
a dozen small operations besides its forward pass, whatever the network. Its batch also shrinks to
the samples that are still standing, and a pass of a small batch costs a tenth more per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peers
import problems
import torch
from harness import Case, Goal, Options, Provider
from problems import ALPHA, EPS, Maker, Problem
from torch import Tensor, nn

TITLE = "Evaluation"
LAYOUT = "list"
IMAGES = 100
MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")

_ENSEMBLE = f"AutoAttack standard, SmallCNN, {IMAGES} images"
_PGD = "PGD-10, SmallCNN, all 2,000 test images"
_OFF = "points off torchattacks"

GOALS = [
    Goal("AutoAttack: faster than the authors' code", _ENSEMBLE, "pyautoattack", at_most=1.0),
    Goal("AutoAttack: 1.1 times its own passes, made bare", _ENSEMBLE, "floor", at_most=1.1),
    Goal(
        'AutoAttack, speed="fast": 1.5 times as fast as the authors\' code',
        _ENSEMBLE,
        "pyautoattack",
        at_least=1.5,
        ours="pyadv fast",
    ),
    Goal(
        "AutoAttack: the verdicts of the authors' code, give or take one",
        _ENSEMBLE,
        "pyautoattack",
        at_most=1,
        fact="differs",
    ),
    Goal(
        'PGD-10, speed="fast": success within 0.2 points of torchattacks\' over all test images',
        _PGD,
        "torchattacks",
        at_most=0.2,
        ours="pyadv fast",
        fact=_OFF,
    ),
]


def cases(options: Options) -> Iterator[Case]:
    from pyadv.attacks import PGD

    problem = problems.small_cnn(options, 2 if options.quick else IMAGES)
    yield _case(
        _ENSEMBLE.replace(str(IMAGES), str(len(problem.x))),
        problem,
        _autoattack(problem, options),
        "pyautoattack",
        runs=(2, 3),
        budget_s=60.0,
    )
    for member in MEMBERS:
        name = f"AutoAttack's {member} alone, SmallCNN, {len(problem.x)} images"
        yield _case(name, problem, {"pyadv": _member(problem, member)}, "", runs=(2, 3))
    problem = problems.small_cnn(options, 4 if options.quick else 2000)
    x, y = problem.x, problem.y
    settings: dict[str, Any] = dict(eps=EPS, alpha=ALPHA, steps=options.steps, start="none")

    def ours(model: nn.Module, **more: Any) -> Callable[[], Tensor]:
        attack = PGD(model, **settings, **more)
        return lambda: attack(x, y)

    makers = problems.at_all_speeds(ours)
    if "torchattacks" in options.peers:
        makers["torchattacks"] = peers.pgd(x, y, EPS, ALPHA, options.steps)["torchattacks"]
    more: dict[str, Any] = dict(runs=(3, 5), budget_s=15.0, steps=options.steps)
    yield _case(_PGD, problem, makers, "torchattacks", **more)


def _autoattack(problem: Problem, options: Options) -> dict[str, Maker]:
    from pyadv.attacks import AutoAttack

    _, _, x, y, eps, _ = problem

    def ours(model: nn.Module, **more: Any) -> Callable[[], Tensor]:
        attack = AutoAttack(model, eps=eps, seed=0, progress=None, **more)
        return lambda: attack.run_standard_evaluation(x, y, bs=len(x))

    makers = problems.at_all_speeds(ours)
    theirs = peers.autoattack(x, y, eps, len(x), seed=0)
    return makers | {k: make for k, make in theirs.items() if k in options.peers}


def _member(problem: Problem, name: str) -> Maker:
    from pyadv.attacks import AutoAttack

    _, _, x, y, eps, _ = problem

    def ours(model: nn.Module) -> Callable[[], Tensor]:
        settings: dict[str, Any] = dict(eps=eps, seed=0, progress=None)
        attack = AutoAttack(model, version="custom", attacks=[name], **settings)
        return lambda: attack.run_standard_evaluation(x, y, bs=len(x))

    return ours


def _case(name: str, problem: Problem, makers: dict[str, Maker], judge: str, **more: Any) -> Case:
    """Return a case that compares all verdicts with those of the peer `judge`, if it is
    installed."""
    _, model, x, y, eps, _ = problem
    providers, standing = {}, {}
    for who, make in makers.items():
        call = make(model)
        counted, x_adv = problems.count(who, model, make)
        x_adv = call() if x_adv is None else x_adv
        providers[who] = Provider(call, passes=counted, peer=who in peers.MODULES, result=x_adv)
        with torch.no_grad():
            standing[who] = model(x_adv).argmax(1) == y
        providers[who].facts["robust %"] = round(100 * standing[who].double().mean().item(), 2)
    if judge in standing:
        for who, provider in providers.items():
            differs = standing[who] != standing[judge]
            provider.facts["differs"] = int(differs.sum())
            off = standing[who].double().mean() - standing[judge].double().mean()
            provider.facts[_OFF.replace("torchattacks", judge)] = round(abs(100 * off.item()), 3)
    if name.startswith("AutoAttack") and providers["pyadv"].passes:
        call = _bare_passes(model, x, *providers["pyadv"].passes)
        providers["floor"] = Provider(call, passes=providers["pyadv"].passes, yardstick=True)

    def check(x_adv: Tensor) -> str | None:
        outside = ((x_adv - x).abs().max() - eps).item()
        return None if outside < 1e-5 else f"lies outside the ball by {outside:.2g}"

    return Case(name, providers, check, images=len(x), peak=False, **more)


def _bare_passes(model: nn.Module, x: Tensor, forwards: int, backwards: int) -> Callable[[], Any]:
    both = problems.floor(model, x, -(-backwards // len(x)))

    def call() -> None:
        both()
        with torch.no_grad():
            for _ in range(-(-(forwards - backwards) // len(x))):
                model(x)

    return call
