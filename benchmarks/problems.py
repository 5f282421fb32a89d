"""Networks to attack and train, images for them, and the wrapper that counts passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import Options
from torch import Tensor, nn

Objective = Callable[..., Tensor]  # (model, x, y, epoch=) -> the loss of a training step

EPS, ALPHA = 0.1, 0.025  # for the embedded grey images
COLOUR_EPS, COLOUR_ALPHA = 8 / 255, 2 / 255


class Problem(NamedTuple):
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    alpha: float


def small_cnn(options: Options, batch: int, correct: bool = False) -> Problem:
    """Return an adversarially trained SmallCNN and a batch of test images.

    Args:
        options: The options of the question.
        batch: Number of images.
        correct: Whether to take only images that the network classifies correctly, for attacks that
            skip the others.
    """
    model = trained(options)
    x, y = (t.to(options.device) for t in _images()[2:])
    if correct:
        with torch.no_grad():
            kept = model(x).argmax(1) == y
        x, y = x[kept], y[kept]
    return Problem("SmallCNN", model, x[:batch], y[:batch], EPS, ALPHA)


class Free(nn.Module):
    """A network that returns ten of its inputs as logits and costs almost nothing, so that only the
    attack's own time remains."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)[:, :10]


def free(options: Options, batch: int, shape: tuple[int, ...] = (3, 32, 32)) -> Problem:
    """Return random images and a network that costs nothing."""
    torch.manual_seed(0)
    model = Free().to(options.device)
    x = torch.rand(batch, *shape).to(options.device)
    name = f"no network, {'x'.join(map(str, shape))}"
    return Problem(name, model, x, model(x).argmax(1), COLOUR_EPS, COLOUR_ALPHA)


def resnet18(options: Options, batch: int) -> Problem:
    """Return a ResNet-18 with random weights, random images and the predictions as labels; the cost
    of an attack does not depend on them."""
    from pyadv.models import ResNet18

    size = 8 if options.quick else 32
    torch.manual_seed(0)
    model = ResNet18().eval().to(options.device)
    x = torch.rand(batch, 3, size, size).to(options.device)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Problem("ResNet-18", model, x, y, COLOUR_EPS, COLOUR_ALPHA)


def trained(options: Options) -> nn.Module:
    """Return a SmallCNN after four epochs of adversarial training, in eval mode."""
    return _trained(options.device, 1 if options.quick else 4, 500 if options.quick else None)


@functools.cache
def _trained(device: torch.device, epochs: int, images: int | None) -> nn.Module:
    from pyadv.attacks import PGD
    from pyadv.models import SmallCNN
    from pyadv.objectives import AT

    torch.manual_seed(0)
    model = SmallCNN().to(device)
    x, y = (t[:images].to(device) for t in _images()[:2])
    objective = AT(PGD(eps=EPS, alpha=EPS / 2, steps=4, seed=0))
    return fit(model, objective, x, y, epochs)


def fit(model: nn.Module, objective: Objective, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train by Adam in batches of 128, drawn from torch's generator; return it in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), device=x.device).split(128):
            optimizer.zero_grad()
            objective(model, x[rows], y[rows], epoch=epoch).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def standard(model: nn.Module, x: Tensor, y: Tensor, epoch: int) -> Tensor:
    """Return the mean cross-entropy: the objective of standard training."""
    return nn.functional.cross_entropy(model(x), y)


@functools.cache
def _images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pyadv.data import load

    data = load("fashion-mini")
    return data.train_x, data.train_y, data.test_x, data.test_y


class Counted(nn.Module):
    """A wrapper that counts the samples that go forward through a model and back to its input."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


Maker = Callable[[nn.Module], Callable[[], Any]]


def count(name: str, model: nn.Module, make: Maker) -> tuple[tuple[int, int] | None, Any]:
    """Count the passes of one call of `make(model)`.

    Returns:
        The samples that went forward and backward, and the result of the call. Both are None if the
        call fails, which the timing then reports, or if `name` is a fast form, whose view of the
        network cannot look through the counting wrapper.
    """
    if SPEEDS.get(name):
        return None, None
    counted = Counted(model)
    counted.train(model.training)
    try:
        result = make(counted)()
    except Exception:
        return None, None
    return (counted.forwards, counted.backwards), result


SPEEDS = {
    "pyadv": {},
    "pyadv fast": {"speed": "fast"},
    "pyadv bfloat16": {"speed": "bfloat16"},
}


def at_all_speeds(make: Callable[..., Callable[[], Any]]) -> dict[str, Maker]:
    return {name: functools.partial(make, **settings) for name, settings in SPEEDS.items()}


def floor(model: nn.Module, x: Tensor, steps: int) -> Callable[[], None]:
    """Return a call of `steps` bare forward passes and input gradients, from a constant gradient of
    the logits."""

    def call() -> None:
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            logits = model(leaf)
            torch.autograd.grad(logits, leaf, torch.ones_like(logits))

    return call
