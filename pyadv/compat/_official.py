"""What the official codes share: their random starts and their attack."""

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
from pyadv.menus import LossName

T = TypeVar("T")


def choose(name: str, key: str, choices: Mapping[str, T]) -> T:
    """Return the entry of `choices` for an argument `name` of an official code.

    Raises:
        ValueError: `key` is none of the choices; the official codes crash later, or not at all.
    """
    checks.choice(name, key, tuple(choices))
    return choices[key]


def normal_start(x: Tensor) -> Tensor:
    """Return x + 0.001 N(0, 1), not clipped to the box. Draws from torch's CPU generator, whatever
    the device of x."""
    return x + (SMALL * torch.randn(x.shape)).to(x)


def clipped_normal_start(x: Tensor) -> Tensor:
    """Return `normal_start(x)` clipped to the box."""
    return normal_start(x).clamp(0, 1)


def uniform_start(epsilon: float) -> Start:
    """Return a start uniform in the ball, from NumPy's generator, clipped to the box."""

    def start(x: Tensor) -> Tensor:
        noise = np.random.uniform(-epsilon, epsilon, x.shape)
        return (x + torch.from_numpy(noise).float().to(x)).clamp(0, 1)

    return start


def linf_attack(
    loss: LossName | LossFunction, start: Start, epsilon: float, step_size: float, steps: int
) -> PGD:
    """Return a PGD attack that differentiates the official expressions, rounding included."""
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
    loss: LossName, epsilon: float, step_size: float, perturb_steps: int, distance: str
) -> PGD:
    """Return the attack of TRADES, MART and MAIL. With any `distance` but "l_inf" it makes no step,
    and its result is the start."""
    if distance != "l_inf" or perturb_steps == 0:
        return linf_attack("ce", clipped_normal_start, epsilon, step_size, 0)
    return linf_attack(loss, normal_start, epsilon, step_size, perturb_steps)
