"""How fast is the network's view that `speed="fast"` makes, and does it change who is fooled?

The first cases time one input gradient and one forward pass, on the model and on its view, also in
16 bits and with single options of the view turned off. The last cases attack test images; `differs`
counts the verdicts that are not those of the exact attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import problems
import torch
from harness import Case, Options, Provider
from problems import Problem
from torch import Tensor, nn

from pyadv.passes import layers
from pyadv.passes import view as view_of

TITLE = "The fast network"
LAYOUT = "list"

_OFF = {
    "without narrow layers": (layers, "NARROW", 0),
    "without Winograd": (layers, "WINOGRAD", {}),
    "without channels-last": (view_of, "WIDE", 1 << 30),  # nor Winograd, which needs it
}


def cases(options: Options) -> Iterator[Case]:
    for build, batches in (
        (problems.small_cnn, (32, 128)),
        (problems.resnet18, (32, 128)),
        *([] if options.quick else [(_preact, (32,))]),
    ):
        for batch in (4,) if options.quick else batches:
            problem = build(options, batch)
            views = _views(problem)
            for what, call in (("input gradient", _gradient), ("forward pass", _forward)):
                yield Case(
                    f"One {what}, {problem.name}, batch {batch}",
                    {k: Provider(call(view, problem.x)) for k, view in views.items()},
                    _near(call(problem.model, problem.x)()),
                    ours="fast",
                    images=batch,
                    runs=(3, 30),
                )
    yield from _verdicts(options)


def _preact(options: Options, batch: int) -> Problem:
    from pyadv.models import PreActResNet18

    torch.manual_seed(0)
    model = PreActResNet18().eval().to(options.device)
    return problems.resnet18(options, batch)._replace(name="PreActResNet-18", model=model)


def _views(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    from pyadv.attacks import fast_view

    def view(**more: Any) -> Callable[[Tensor], Tensor]:
        view_of._views.clear()  # a view of its own
        return fast_view(problem.model, problem.x, **more)

    views = {"model": problem.model, "fast": view(), "bfloat16": view(dtype=torch.bfloat16)}
    for name, (module, constant, off) in _OFF.items():
        kept = getattr(module, constant)
        setattr(module, constant, off)
        try:
            views[name] = view()
        finally:
            setattr(module, constant, kept)
    return views


def _gradient(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        logits = model(leaf)
        return torch.autograd.grad(logits, leaf, torch.ones_like(logits))[0]

    return call


def _forward(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        return model(x)

    return call


def _near(expected: Tensor) -> Callable[[Tensor], str | None]:
    """Return a check that a gradient points in the expected direction. Rounding may switch single
    ReLUs, and 16 bits change every entry, so exact equality cannot be asked for."""

    def check(result: Tensor) -> str | None:
        cosine = nn.functional.cosine_similarity(result.flatten(), expected.flatten(), 0).item()
        return None if cosine > 0.9 else f"has another direction: cosine {cosine:.3f}"

    return check


def _verdicts(options: Options) -> Iterator[Case]:
    from pyadv import attacks

    problem = problems.small_cnn(options, 40 if options.quick else 10000)
    eps, few = problem.eps, options.quick
    pgd = {"eps": eps, "alpha": problem.alpha, "steps": options.steps}
    for name, attack, settings, images in (
        (f"PGD-{options.steps}", attacks.PGD, pgd, 10000),
        ("APGD, 20 steps", attacks.APGD, {"eps": eps, "steps": 2 if few else 20}, 1000),
        ("Square, 200 queries", attacks.Square, {"eps": eps, "queries": 2 if few else 200}, 500),
        ("FAB, 10 steps", attacks.FAB, {"eps": eps, "steps": 2 if few else 10}, 100),
    ):
        x, y = problem.x[:images], problem.y[:images]
        yield Case(
            f"{name}, {len(x)} images, SmallCNN",
            _at_all_speeds(attack, problem.model, x, y, settings),
            ours="fast",
            images=len(x),
            runs=(2, 5),
            peak=False,
        )


def _at_all_speeds(
    attack: type, model: nn.Module, x: Tensor, y: Tensor, settings: dict[str, Any]
) -> dict[str, Provider]:
    exact, providers = None, {}
    for speed in ("exact", "fast", "bfloat16"):
        search = attack(model, speed=speed, seed=0, **settings)

        def call(search: Any = search) -> Tensor:
            batches = zip(x.split(250), y.split(250), strict=True)
            return torch.cat([search.run(*batch, draw=0).correct for batch in batches])

        correct = call()
        exact = correct if exact is None else exact
        facts = {
            "robust %": round(100 * correct.double().mean().item(), 2),
            "differs": int((correct != exact).sum()),
        }
        providers[speed] = Provider(call, facts=facts, result=correct)
    return providers
