"""What does a training step cost, compared with a loop in the form of the authors' code?

One step is the attack, the loss and its backward pass, without the optimiser. All providers start
at the same point and must agree on the loss. The floor is the least that the method can do on the
unchanged network: one input gradient per attack step and the method's train-mode passes forward and
backward (for FAT, without early stop). `pyadv fast` attacks the view of the network that
`speed="fast"` makes, rebuilt at each step; `pyadv train` does so by default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import official
import problems
import torch
import torch.nn.functional as F
from harness import Case, Goal, Options, Provider, close
from problems import ALPHA, EPS
from torch import Tensor, nn

TITLE = "Training steps"
LAYOUT = "list"
BATCH = 128

_PENALTY = "EMR's penalty, {}, batch {}"


def _name(method: str, batch: int = BATCH) -> str:
    return f"{method}, SmallCNN, batch {batch}"


GOALS = [
    *(
        Goal(
            f"{method} on SmallCNN: 1.5 times as fast as the authors' form",
            _name(method),
            "official form",
            at_least=1.5,
            ours="pyadv fast",
        )
        for method in ("GAIRAT", "FAT", "TRADES", "AT + EMR")
    ),
    *(
        Goal(
            f"EMR's penalty in tangent form on {network}: at most twice a train-mode pass "
            "forward and backward",
            _PENALTY.format(network, batch),
            "forward and backward",
            at_most=2.0,
            ours="tangent",
        )
        for network, batch in (("SmallCNN", 128), ("ResNet-18", 32))
    ),
]


def cases(options: Options) -> Iterator[Case]:
    from pyadv.attacks import PGD, FriendlyPGD
    from pyadv.objectives import AT, EMR, FAT, GAIRAT, MART, TRADES

    batch = 16 if options.quick else BATCH
    problem = problems.small_cnn(options, batch)
    model, x, y = copy.deepcopy(problem.model), problem.x, problem.y
    torch.manual_seed(0)
    start = (x + EPS * (2 * torch.rand(x.shape).to(x) - 1)).clamp(0, 1)
    settings: dict[str, Any] = dict(
        eps=EPS, alpha=ALPHA, steps=options.steps, start=lambda _: start
    )
    emr = EMR(3.0, 40.0, reduction="official")
    for method, objective_of, form, train_passes in (
        ("AT", lambda s: AT(PGD(**s)), official.at, 1),
        ("TRADES", lambda s: TRADES(PGD(loss="kl", **s)), official.trades, 2),
        ("MART", lambda s: MART(PGD(**s)), official.mart, 2),
        ("GAIRAT", lambda s: GAIRAT(PGD(**s)), official.gairat, 1),
        ("FAT", lambda s: FAT(FriendlyPGD(tau=0, **s)), official.fat, 1),
        ("AT + EMR", lambda s: AT(PGD(**s)) + emr, official.at_emr, 1),
    ):

        def ours(net: nn.Module, made: Any = objective_of, **more: Any) -> Callable[[], Tensor]:
            objective = made(settings | more)
            return lambda: objective(net.train(), x, y)

        def theirs(net: nn.Module, form: Any = form) -> Callable[[], Tensor]:
            return lambda: form(net, x, y, start, ALPHA, EPS, options.steps)

        def floor(net: nn.Module, n: int = train_passes) -> Callable[[], Tensor]:
            attack = problems.floor(net, x, options.steps)

            def call() -> Tensor:
                attack()
                return sum(F.cross_entropy(net(x), y) for _ in range(n))

            return call

        makers = problems.at_all_speeds(ours) | {"official form": theirs, "floor": floor}
        yield Case(
            _name(method, batch),
            {k: _provider(model, k, make) for k, make in makers.items()},
            _same_loss(makers["pyadv"](model)().item()),
            images=batch,
            steps=options.steps,
            budget_s=8.0,
        )
    yield from _penalties(options)


def _provider(model: nn.Module, name: str, make: problems.Maker) -> Provider:
    def stepped(net: nn.Module) -> Callable[[], Tensor]:
        loss_of = make(net)

        def call() -> Tensor:
            net.zero_grad()
            loss = loss_of()
            loss.backward()
            return loss.detach()

        return call

    counted, _ = problems.count(name, model, stepped)
    return Provider(stepped(model), passes=counted, yardstick=name == "floor")


def _same_loss(expected: float) -> Callable[[Tensor], str | None]:
    def check(loss: Tensor) -> str | None:
        if abs(loss.item() - expected) > 0.02 * abs(expected):
            return f"has loss {loss.item():.4f}, but pyadv has {expected:.4f}"
        return None

    return check


def _penalties(options: Options) -> Iterator[Case]:
    """Compare three forms of the penalty's derivative with one ordinary training pass."""
    from pyadv.objectives import EMR
    from pyadv.objectives.step import Step

    for problem in (
        problems.small_cnn(options, 4 if options.quick else 128),
        problems.resnet18(options, 2 if options.quick else 32),
    ):
        model, x, y = copy.deepcopy(problem.model), problem.x, problem.y

        def penalty(derivative: str, model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Any:
            part = EMR(1.0, 40.0, derivative=derivative)

            def call() -> Tensor:
                model.zero_grad()
                loss = part(Step(model, x, y, epoch=1))
                loss.backward()
                return loss.detach()

            return call

        def plain(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            model.train()
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            model.eval()
            return loss

        yield Case(
            _PENALTY.format(problem.name, len(x)),
            {
                "tangent": Provider(penalty("tangent")),
                "double": Provider(penalty("double")),
                "difference": Provider(penalty("difference")),
                "forward and backward": Provider(plain, yardstick=True),
            },
            close(penalty("double")(), rtol=1e-3),
            ours="tangent",
            images=len(x),
            runs=(4, 30),
            budget_s=15.0,
        )
