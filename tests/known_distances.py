"""Linear classifiers with known distances to their nearest decision boundaries."""

from __future__ import annotations

import math

import torch
from networks import RowLinear

from pyadv.reference.hyperplane import offset_to_hyperplane

ORDER = {"Linf": math.inf, "L2": 2, "L1": 1}
DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}


def unbounded(classes: int, norm: str, device):
    """Return a model, seven inputs, their labels, and |margin| / ||w||_q of the nearest class."""
    generator = torch.Generator().manual_seed(classes)
    net = RowLinear(30, classes, dtype=torch.float64).to(device)
    x = torch.rand(7, 30, dtype=torch.float64, generator=generator).to(device)
    z = net(x).detach()
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    w = (net.weight[:, None] - net.weight).detach()
    slopes = torch.linalg.vector_norm(w, DUAL[norm], dim=2).T[y]
    gaps[torch.arange(7), y] = math.inf
    return net, x, y, (gaps / slopes.clamp(min=1e-9)).amin(1)


def in_the_box(norm: str, device):
    """Return a model of two classes, nine inputs, their labels, and the distances in the box [0,
    1].

    The box binds: each label changes at 60 % of the change of the margin that the box allows.
    """
    generator = torch.Generator().manual_seed(1)
    draw = dict(generator=generator, dtype=torch.float64)
    x, w = torch.rand(9, 8, **draw).to(device), torch.randn(8, **draw).to(device)
    value = -0.6 * torch.where(w > 0, 1 - x, x).mul(w.abs()).sum(1)

    def model(v):
        f = (v - x) @ w + value
        return torch.stack([-f, f], 1)

    way = offset_to_hyperplane(x, w.expand_as(x), value, norm, 0.0, 1.0)
    exact = torch.linalg.vector_norm(way, ORDER[norm], dim=1)
    return model, x, torch.zeros(9, dtype=torch.int64, device=device), exact
