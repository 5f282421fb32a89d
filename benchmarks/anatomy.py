"""Where does the time go where a goal is missed or just met?

Each case compares a whole with its parts, each timed alone. The difference is Python between them.

- PGD on SmallCNN: the loss and the step alone are one per cent of the attack, and the attack takes
  one to two per cent longer than a bare loop over the same ops ("network, loss and step"). The rest
  of the time beyond the network's own passes arises only when passes and steps alternate; probably
  each evicts the other's data from the second-level cache.
- A differentiable loss at (128, 10): the kernel is a tenth of the time. A `torch.autograd.Function`
  that does nothing costs two fifths. `F.cross_entropy` does not pay for that, because its autograd
  nodes are in C++.
- A differentiable loss at (1024, 1000): the kernel takes most of the time and is bound by memory.
  It reads the logits and writes the gradient; the scaling reads and writes the gradient again.
- The Linf step reads three tensors and writes one, as much traffic as two copies. The time of two
  copies is its bound.
- The L2 step needs the norm of the gradient before the first element moves, so it reads a row
  twice, the second time from the second-level cache. Its cost is that of the Linf step plus one
  more reading of three tensors.
- The step of AT + EMR: the attack's passes through the fast view take most of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import problems
import torch
import torch.nn.functional as F
from harness import Case, Options, Provider
from problems import ALPHA, EPS
from torch import Tensor, nn

TITLE = "Where the time goes"
LAYOUT = "list"


def cases(options: Options) -> Iterator[Case]:
    yield _engine(options)
    for shape in [(4, 10)] if options.quick else [(128, 10), (1024, 1000)]:
        yield _loss(options, *shape)
    yield _linf_step(options)
    yield _l2_step(options)
    yield _training_step(options)


def _case(name: str, whole: Callable[[], Any], parts: dict[str, Callable[[], Any]]) -> Case:
    yardsticks = {k: Provider(part, yardstick=True) for k, part in parts.items()}
    return Case(f"Parts of {name}", {"pyadv": whole, **yardsticks}, peak=False, budget_s=10.0)


def _engine(options: Options) -> Case:
    from pyadv import ops
    from pyadv.attacks import PGD
    from pyadv.engine import checks
    from pyadv.passes.borrow import borrowed

    problem = problems.small_cnn(options, 4 if options.quick else 32, correct=True)
    _, model, x, y, eps, alpha = problem
    attack = PGD(model, eps=eps, alpha=alpha, steps=options.steps, start="none")
    with torch.no_grad():
        logits = model(x)
    grad, x_adv = torch.randn_like(x), x.clone()

    def by_hand() -> None:
        x_adv = x.clone()
        for _ in range(options.steps):
            leaf = x_adv.detach().requires_grad_()
            logits = model(leaf)
            cotangent = ops.attack_loss(logits, y, "ce").grad_logits
            (grad,) = torch.autograd.grad(logits, leaf, cotangent)
            ops.linf_step(x_adv, grad, x, alpha, eps, 0.0, 1.0, out=x_adv)

    def times(call: Callable[[], Any]) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(options.steps):
                call()

        return repeated

    def modes() -> None:
        with borrowed(model, "eval"):
            pass

    return _case(
        f"PGD, {options.steps} steps, SmallCNN, batch {len(x)}",
        lambda: attack(x, y),
        {
            "network": problems.floor(model, x, options.steps),
            "network, loss and step": by_hand,
            "attack_loss": times(lambda: ops.attack_loss(logits, y, "ce")),
            "linf_step": times(lambda: ops.linf_step(x_adv, grad, x, alpha, eps, out=x_adv)),
            "values of x": lambda: checks.values(x, {"eps": eps, "alpha": alpha}, 0.0, 1.0),
            "modes": modes,
        },
    )


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.shape = z.shape
        return z.new_empty(len(z))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(ctx.shape)


def _loss(options: Options, rows: int, classes: int) -> Case:
    from pyadv import ops

    torch.manual_seed(0)
    z = (3 * torch.randn(rows, classes)).to(options.device)
    y, weight = (t.to(options.device) for t in (torch.randint(classes, (rows,)), torch.rand(rows)))
    leaf, ones, unit = z.clone().requires_grad_(), torch.ones_like(weight), torch.randn_like(z)

    def through(function: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(leaf), leaf, ones)

    return _case(
        f"weighted_cross_entropy, {rows}x{classes}, forward and backward",
        through(lambda z: ops.weighted_cross_entropy(z, y, weight)),
        {
            "eager": through(lambda z: weight * F.cross_entropy(z, y, reduction="none")),
            "a Function that does nothing": through(_Nothing.apply),
            "kernel": lambda: torch.ops.pyadv.weighted_cross_entropy_and_gradient(
                z, y, weight, None
            ),
            "scaling": lambda: unit.mul_(ones.unsqueeze(1)),
        },
    )


def _steps(options: Options) -> tuple[Tensor, ...]:
    """Return x, a gradient, an iterate and another tensor."""
    torch.manual_seed(0)
    shape = (2, 3, 8, 8) if options.quick else (128, 3, 32, 32)
    x, grad = (torch.randn(shape).to(options.device) for _ in range(2))
    return x, grad, x.clone(), x.clone()


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))


def _linf_step(options: Options) -> Case:
    from pyadv import ops
    from pyadv.ops.steps import stepper

    x, grad, x_adv, other = _steps(options)
    step = stepper("Linf", x, 0.1, 0.5, None, None, 0.0)

    def twice() -> None:
        other.copy_(x)
        x_adv.copy_(grad)

    return _case(
        f"linf_step in place, {_shape(x)}",
        lambda: ops.linf_step(x_adv, grad, x, 0.1, 0.5, out=x_adv),
        {"as the engine calls it": lambda: step(x_adv, grad, None), "copy_, of two tensors": twice},
    )


def _l2_step(options: Options) -> Case:
    from pyadv import ops

    x, grad, x_adv, other = _steps(options)
    return _case(
        f"l2_step in place, {_shape(x)}",
        lambda: ops.l2_step(x_adv, grad, x, 0.1, 0.5, out=x_adv),
        {
            "linf_step": lambda: ops.linf_step(x_adv, grad, x, 0.1, 0.5, out=x_adv),
            "a reading of one tensor": lambda: ops.row_square_sum(grad),
            "copy_": lambda: other.copy_(x),
        },
    )


def _training_step(options: Options) -> Case:
    from pyadv.attacks import PGD, fast_view
    from pyadv.objectives import AT, EMR
    from pyadv.objectives.step import Step

    problem = problems.small_cnn(options, 8 if options.quick else 128)
    model, x, y = copy.deepcopy(problem.model).train(), problem.x, problem.y
    attack = PGD(eps=EPS, alpha=ALPHA, steps=options.steps, speed="fast")
    emr = EMR(3.0, 40.0, reduction="official")
    objective = AT(attack) + emr

    def stepped(loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            loss(model).backward()

        return call

    def view() -> None:
        fast_view(model.eval(), x)
        model.train()

    return _case(
        f'AT + EMR, speed="fast", SmallCNN, batch {len(x)}',
        stepped(lambda net: objective(net, x, y)),
        {
            "attack": lambda: attack.perturb(x, y, model=model),
            "training pass": stepped(lambda net: F.cross_entropy(net(x), y)),
            "penalty": stepped(lambda net: emr(Step(net, x, y, epoch=1))),
            "view": view,
        },
    )
