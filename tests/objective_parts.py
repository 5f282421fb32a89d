"""A small network with BatchNorm, a batch that it can learn, and attacks on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyadv.attacks import PGD, FriendlyPGD


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def make_batch(size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.rand(size, 1, 6, 6, generator=generator)
    y = torch.arange(size) % 4
    for k, (i, j) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):  # class k has one bright corner
        x[y == k, :, i : i + 3, j : j + 3] += 0.4
    return x, y


def attack(**settings) -> PGD:
    return PGD(**{"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0, **settings})


def friendly(**settings) -> FriendlyPGD:
    return FriendlyPGD(**{"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0, **settings})


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))
