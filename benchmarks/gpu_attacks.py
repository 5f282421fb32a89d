"""What does a whole attack cost on a GPU, where Python may be slower than the network?

PGD starts from x itself on networks of the size for CIFAR, so that all follow the same iterates.
The floor is one forward pass and one input gradient of the model per step, recorded as one CUDA
graph. `torchattacks' form` and `foolbox's form` are the loops of those libraries, with exactly the
passes and gradients they compute; foolbox's also computes weight gradients. Ratios to them depend
on how fast the host launches kernels, so the goals are bounds on shares of the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import official
import problems
import torch
import torch.nn.functional as F
from attacks import eager_pgd, same_strength
from gpu_kernels import recorded
from harness import Case, Goal, Options, Provider
from problems import Problem
from torch import Tensor, nn

TITLE = "Attacks on a GPU"
LAYOUT = "list"
BATCHES = (16, 128, 512)

_NAME = "PGD, 10 steps, {}, batch {}"
_GAIRAT = "GAIRAT's inner loop, 10 steps, ResNet-18, batch 128"
_FRIENDLY = "friendly PGD, tau 1, 10 steps, ResNet-18, batch 512"
# Share of the recorded floor by network, batch and provider.
_SHARES = {
    ("ResNet-18", 16): {"pyadv": 1.15},
    ("ResNet-18", 128): {"pyadv": 1.06, "pyadv fast": 0.61, "pyadv bfloat16": 0.31},
    ("ResNet-18", 512): {"pyadv": 1.06, "pyadv fast": 0.61, "pyadv bfloat16": 0.35},
    ("WRN-34-10", 128): {"pyadv fast": 0.79, "pyadv bfloat16": 0.34},
}

GOALS = [
    *(
        Goal(
            f"PGD-10 on {network}, batch {batch}, {ours}: {share} of the recorded floor",
            _NAME.format(network, batch),
            "floor",
            at_most=share,
            ours=ours,
        )
        for (network, batch), shares in _SHARES.items()
        for ours, share in shares.items()
    ),
    Goal(
        "Friendly PGD, tau 1, batch 512: 1.6 times two recorded steps",
        _FRIENDLY,
        "two steps",
        at_most=1.6,
    ),
    Goal("GAIRAT's inner loop: 5 times its loop over samples", _GAIRAT, "official form", None, 5.0),
]


def cases(options: Options) -> Iterator[Case]:
    batches = (4,) if options.quick else BATCHES
    networks = [problems.resnet18] + ([] if options.quick else [wide_resnet])
    yield _gairat(options)
    for build in networks:
        for batch in batches:
            problem = build(options, batch)
            compiles = problem.name == "ResNet-18" and batch == 128 and not options.quick
            yield Case(
                _NAME.format(problem.name, batch).replace("10 steps", f"{options.steps} steps"),
                _pgd(problem, options, compiles),
                same_strength(problem),
                images=batch,
                steps=options.steps,
                runs=(2, 5) if problem.name == "WRN-34-10" else (5, 10),
                budget_s=1.0,
                peak=False,
            )
    yield _friendly(options)


def wide_resnet(options: Options, batch: int) -> Problem:
    """Return a WideResNet-34-10 with the images of `problems.resnet18`."""
    from pyadv import models

    torch.manual_seed(0)
    model = models.create("wrn-34-10").eval().to(options.device)
    problem = problems.resnet18(options, batch)
    with torch.no_grad():
        y = model(problem.x).argmax(1)
    return problem._replace(name="WRN-34-10", model=model, y=y)


def _pgd(problem: Problem, options: Options, compiles: bool) -> dict[str, Provider]:
    from pyadv.attacks import PGD

    _, model, x, y, eps, alpha = problem
    settings: dict[str, Any] = dict(eps=eps, alpha=alpha, steps=options.steps, start="none")

    def ours(**more: Any) -> Provider:
        attack = PGD(model, **settings, **more)
        for _ in range(3):  # the third call and later ones are replays
            attack(x, y)
        facts = {"replayed": float(attack.graphs.replayed > 0)}
        return Provider(lambda: attack(x, y), facts=facts)

    floor = problems.floor(model, x, options.steps)
    theirs = (x, y, eps, alpha, options.steps)
    providers = {
        "pyadv": ours(),
        "pyadv eager": ours(graph=False),
        "pyadv fast": ours(speed="fast"),
        "pyadv bfloat16": ours(speed="bfloat16"),
        "floor": Provider(recorded(floor) if x.is_cuda else floor, yardstick=True),
        "floor, eager": Provider(floor, yardstick=True),
        "eager": Provider(lambda: eager_pgd(model, *theirs)),
        "torchattacks' form": Provider(lambda: torchattacks_form(model, *theirs)),
        "foolbox's form": Provider(lambda: foolbox_form(model, *theirs)),
    }
    if compiles:
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=False)
        providers["compile"] = Provider(lambda: eager_pgd(compiled, *theirs))
    return providers


def torchattacks_form(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """Return PGD's result in torchattacks' form: the gradient of the mean loss; delta is clamped,
    then the image."""
    loss = nn.CrossEntropyLoss()
    x_adv = x.clone().detach()
    for _ in range(steps):
        x_adv.requires_grad = True
        grad = torch.autograd.grad(
            loss(model(x_adv), y), x_adv, retain_graph=False, create_graph=False
        )[0]
        x_adv = x_adv.detach() + alpha * grad.sign()
        delta = torch.clamp(x_adv - x, min=-eps, max=eps)
        x_adv = torch.clamp(x + delta, min=0, max=1).detach()
    return x_adv


def foolbox_form(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """Return PGD's result in foolbox's form: `backward()` of the summed loss, which also computes
    weight gradients."""
    x_adv = x
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        F.cross_entropy(model(leaf), y, reduction="none").sum().backward()
        x_adv = x_adv + alpha * leaf.grad.sign()
        x_adv = torch.clamp(x + torch.clamp(x_adv - x, -eps, eps), 0, 1)
    model.zero_grad()
    return x_adv


def _gairat(options: Options) -> Case:
    """Return the case of GAIRAT's inner loop, whose results are adversarial images and kappa."""
    from pyadv.attacks import PGD

    batch = 4 if options.quick else 128
    _, model, x, y, eps, alpha = problems.resnet18(options, batch)
    attack = PGD(model, eps=eps, alpha=alpha, steps=options.steps, start="none", scale="exact")

    def ours() -> tuple[Tensor, Tensor]:
        found = attack.perturb(x, y)
        return found.x_adv, found.kappa.to(x)

    def theirs() -> tuple[Tensor, Tensor]:
        result = official.gairat_attack(model, x, y, x, alpha, eps, options.steps)
        model.eval()
        return result

    for _ in range(3):
        expected = ours()[1]

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        off = int((result[1] - expected).abs().sum())  # gradients on a card differ in bits
        return f"{off} steps of kappa differ" if off > batch // 8 else None

    return Case(
        _GAIRAT.replace("10 steps", f"{options.steps} steps").replace("128", str(batch)),
        {"pyadv": Provider(ours), "official form": Provider(theirs)},
        check,
        images=batch,
        steps=options.steps,
        runs=(3, 5),
        budget_s=1.0,
        peak=False,
    )


def _friendly(options: Options) -> Case:
    """Return the case in which all samples leave at the first step, so that compaction saves as
    much as it can."""
    from pyadv.attacks import FriendlyPGD

    batch = 4 if options.quick else 512
    _, model, x, y, eps, alpha = problems.resnet18(options, batch)

    def ours(**more: Any) -> Callable[[], Tensor]:
        attack = FriendlyPGD(model, eps=eps, alpha=alpha, steps=options.steps, tau=1, **more)
        for _ in range(3):
            attack(x, y)
        return lambda: attack(x, y)

    floor = problems.floor(model, x, 2)
    name = _FRIENDLY.replace("10 steps", f"{options.steps} steps").replace("512", str(batch))
    return Case(
        name,
        {
            "two steps": Provider(recorded(floor) if x.is_cuda else floor, yardstick=True),
            "pyadv": ours(),
            "pyadv, compacted": ours(compact=True),
            "pyadv, masked, eager": ours(compact=False, graph=False),
        },
        images=batch,
        steps=options.steps,
        runs=(5, 10),
        budget_s=1.0,
        peak=False,
    )
