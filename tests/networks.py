"""Small networks that the tests attack."""

from __future__ import annotations

import torch
from torch import nn

from pyadv.tensors import flatten


class RowLinear(nn.Module):
    """A linear model that computes each row on its own, in an order that the batch does not
    change."""

    def __init__(self, n: int, classes: int = 3, seed: int = 0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, n, generator=generator, dtype=dtype))

    def forward(self, x):
        rows = flatten(x).contiguous()
        return torch.stack([(rows * w).sum(1) for w in self.weight], 1)


class ConvNet(nn.Module):
    """A small convolutional network with BatchNorm and dropout."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Recorded:
    """A model that records its inputs."""

    def __init__(self, model):
        self.model = model
        self.inputs = []

    def __call__(self, x):
        self.inputs.append(x.detach().clone())
        return self.model(x)
