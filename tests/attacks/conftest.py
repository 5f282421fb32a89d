"""Fixtures of the comparisons with the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def float64(monkeypatch):
    """Make float64 the default dtype, and keep the authors' code from rounding to float32 in
    places."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def problem(float64):
    """Return a smooth network, inputs, and the labels that it predicts for them."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 24), nn.Tanh()),
        nn.Linear(24, 6),
    )
    with torch.no_grad():
        net[-1].weight *= 6
    x = torch.rand(5, 2, 6, 6)
    return net, x, net(x).argmax(1)
