"""What the official codes share: their starts, drawn as they draw them, and their attack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pyadv.attacks import PGD
from pyadv.engine import checks
from pyadv.engine.losses import LossFunction
from pyadv.engine.starts import SMALL, Start

T = TypeVar("T")


def choose(name: str, key: str, choices: Mapping[str, T]) -> T:
    """What an official code spells as an argument; it crashes later on other spellings."""
    checks.choice(name, key, tuple(choices))
    return choices[key]


def normal_start(x: Tensor) -> Tensor:
    """x + 0.001 N(0, 1), from torch's CPU generator on every device, not clipped to the box."""
    return x + (SMALL * torch.randn(x.shape)).to(x)


def clipped_normal_start(x: Tensor) -> Tensor:
    return normal_start(x).clamp(0, 1)


def uniform_start(epsilon: float) -> Start:
    """Uniform in the ball, from NumPy's generator, clipped to the box."""

    def start(x: Tensor) -> Tensor:
        noise = np.random.uniform(-epsilon, epsilon, x.shape)
        return (x + torch.from_numpy(noise).float().to(x)).clamp(0, 1)

    return start


def linf_attack(
    loss: str | LossFunction, start: Start, epsilon: float, step_size: float, steps: int
) -> PGD:
    """Differentiates the plain expressions: what rounds to zero there does so here."""
    return PGD(
        eps=epsilon,
        alpha=step_size,
        steps=steps,
        loss=loss,
        start=start,
        grad_mode="autograd",
        scale="exact",
    )


def training_attack(
    loss: str, epsilon: float, step_size: float, perturb_steps: int, distance: str
) -> PGD:
    """Of TRADES, MART and MAIL. For any `distance` but "l_inf" it is the noise alone."""
    if distance != "l_inf" or perturb_steps == 0:
        return linf_attack("ce", clipped_normal_start, epsilon, step_size, 0)
    return linf_attack(loss, normal_start, epsilon, step_size, perturb_steps)
