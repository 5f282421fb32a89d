"""What does a whole attack cost beyond the network's own forward and backward passes?

The floor has one bare forward pass and one input gradient for each step of the attack. All PGD
providers start at x and follow the same iterates; `eager` is a carefully written loop. The overhead
of the engine is measured with a network that costs nothing, on images of the same size, and divided
by the floor of the real network. Measured on the real network directly, the difference would be
smaller than the noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import peers
import problems
import torch
import torch.nn.functional as F
from harness import Case, Goal, Options, Provider
from problems import Maker, Problem
from torch import Tensor, nn

TITLE = "Attacks"
LAYOUT = "list"
BATCH = 32

_PGD, _APGD, _FRIENDLY = "PGD", "APGD", "friendly PGD, tau 0"
GREY, COLOUR = (1, 28, 28), (3, 32, 32)  # images of SmallCNN and of ResNet-18
_SMALL, _LARGE, _FREE_GREY, _FREE_COLOUR = (
    f"10 steps, {n}, batch {BATCH}"
    for n in ("SmallCNN", "ResNet-18", "no network, 1x28x28", "no network, 3x32x32")
)

GOALS = [
    Goal(
        "The engine adds less than 2 % to SmallCNN's own passes (share)",
        f"{_PGD}, {_FREE_GREY}",
        "floor",
        at_most=0.02,
        share_of=f"{_PGD}, {_SMALL}",
    ),
    Goal(
        "The engine adds less than 0.3 % to ResNet-18's own passes (share)",
        f"{_PGD}, {_FREE_COLOUR}",
        "floor",
        at_most=0.003,
        share_of=f"{_PGD}, {_LARGE}",
    ),
    Goal("Faster than every peer on SmallCNN", f"{_PGD}, {_SMALL}", "peers", at_most=1.0),
    Goal("Faster than every peer on ResNet-18", f"{_PGD}, {_LARGE}", "peers", at_most=1.0),
    Goal(
        'PGD-10 on ResNet-18, speed="fast": 2.5 times torchattacks',
        f"{_PGD}, {_LARGE}",
        "torchattacks",
        at_least=2.5,
        ours="pyadv fast",
    ),
]


def cases(options: Options) -> Iterator[Case]:
    batch = 4 if options.quick else BATCH
    free = (functools.partial(problems.free, shape=shape) for shape in (GREY, COLOUR))
    small_cnn = functools.partial(problems.small_cnn, correct=True)
    for build in (*free, small_cnn, problems.resnet18):
        problem = build(options, batch)
        attacks = [(_PGD, _pgd(problem, options)), (_APGD, _apgd(problem, options))]
        if (
            problem.name == "SmallCNN"
        ):  # labels of other networks are predictions, so all samples fall at once
            attacks.append((_FRIENDLY, _friendly(problem, options)))
        large = problem.name == "ResNet-18"
        for name, makers in attacks:
            yield Case(
                f"{name}, {options.steps} steps, {problem.name}, batch {batch}",
                {k: _provider(problem, k, make) for k, make in makers.items()},
                same_strength(problem),
                images=batch,
                steps=options.steps,
                runs=(30, 60) if not large else (3, 5) if name == _PGD else (2, 3),
                budget_s=60.0 if large else 10.0,
                peak=not large,
            )


def _provider(problem: Problem, name: str, make: Maker) -> Provider:
    counted, result = problems.count(name, problem.model, make)
    return Provider(
        make(problem.model),
        passes=counted,
        peer=name in peers.MODULES,
        yardstick=name == "floor",
        result=result,
    )


def same_strength(problem: Problem) -> Callable[[Tensor], str | None]:
    """Return a check that a result lies in the ball and the box and leaves as many samples correct
    as pyadv's attack, within an eighth: starts and rounding of small gradients differ."""
    x, y, eps = problem.x, problem.y, problem.eps
    tolerance = max(len(x) // 8, 2)
    left: list[int] = []

    def check(x_adv: Tensor) -> str | None:
        outside = ((x_adv - x).abs().max() - eps).item()
        if not outside < 1e-5 or x_adv.min() < 0 or x_adv.max() > 1:
            return f"lies outside the ball by {outside:.2g}, or outside the box"
        with torch.no_grad():
            left.append(int((problem.model(x_adv).argmax(1) == y).sum()))
        if abs(left[-1] - left[0]) > tolerance:
            return f"leaves {left[-1]} of {len(y)} samples correct where pyadv leaves {left[0]}"
        return None

    return check


def _pgd(problem: Problem, options: Options) -> dict[str, Maker]:
    from pyadv.attacks import PGD

    _, _, x, y, eps, alpha = problem
    settings: dict[str, Any] = dict(eps=eps, alpha=alpha, steps=options.steps, start="none")

    def ours(model: nn.Module, **more: Any) -> Callable[[], Tensor]:
        attack = PGD(model, **settings, **more)
        return lambda: attack(x, y)

    makers = problems.at_all_speeds(ours)
    makers["floor"] = lambda model: problems.floor(model, x, options.steps)
    makers["eager"] = lambda model: lambda: eager_pgd(model, x, y, eps, alpha, options.steps)
    theirs = peers.pgd(x, y, eps, alpha, options.steps)
    return makers | {k: make for k, make in theirs.items() if k in options.peers}


def eager_pgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """Run PGD in place, without weight gradients, with the bounds of the ball computed once."""
    low, high = (x - eps).clamp_min_(0), (x + eps).clamp_max_(1)
    x_adv = x.clone()
    for _ in range(steps):
        leaf = x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        x_adv = x_adv.detach().add_(grad.sign_(), alpha=alpha)
        torch.minimum(torch.maximum(x_adv, low, out=x_adv), high, out=x_adv)
    return x_adv


def _apgd(problem: Problem, options: Options) -> dict[str, Maker]:
    from pyadv.attacks import APGD

    _, _, x, y, eps, _ = problem

    def ours(model: nn.Module, **more: Any) -> Callable[[], Tensor]:
        attack = APGD(model, eps=eps, steps=options.steps, best="loss", seed=0, **more)
        return lambda: attack(x, y)

    makers = problems.at_all_speeds(ours)
    makers["floor"] = lambda model: problems.floor(model, x, options.steps)
    theirs = peers.apgd(x, y, eps, options.steps)
    return makers | {k: make for k, make in theirs.items() if k in options.peers}


def _friendly(problem: Problem, options: Options) -> dict[str, Maker]:
    from official import earlystop

    from pyadv.attacks import FriendlyPGD

    _, _, x, y, eps, alpha = problem
    settings: dict[str, Any] = dict(eps=eps, alpha=alpha, steps=options.steps)

    def ours(model: nn.Module) -> Callable[[], Tensor]:
        attack = FriendlyPGD(model, tau=0, seed=0, **settings)
        return lambda: attack(x, y)

    def official(model: nn.Module) -> Callable[[], Tensor]:
        order = torch.arange(len(x), device=x.device)

        def call() -> Tensor:
            x_adv, index = earlystop(model, x, y, order, alpha, eps, options.steps, tau=0)
            return torch.empty_like(x).index_copy_(0, index, x_adv)

        return call

    return {
        "pyadv": ours,
        "floor": lambda model: problems.floor(model, x, options.steps),
        "official form": official,
    }
