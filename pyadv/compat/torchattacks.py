"""Attacks in the shape of torchattacks: `atk = PGD(model, eps=8/255); x_adv = atk(images, labels)`.

Starts come from torch's generator and gradients from the plain cross-entropy, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyadv import attacks
from pyadv.attacks._start import Start


class _Attack:
    def __init__(self, model: Callable[..., Any], **settings: Any):
        self.model = model
        self._settings = {"grad_mode": "autograd", "scale": "exact", **settings}
        self.targeted = False

    def set_mode_targeted_by_label(self, quiet: bool = True) -> None:
        """From now on labels are the classes to reach."""
        self.targeted = True

    def set_mode_default(self) -> None:
        self.targeted = False

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial examples for inputs in [0, 1]."""
        return attacks.PGD(self.model, targeted=self.targeted, **self._settings)(inputs, labels)


class PGD(_Attack):
    """Linf, from a uniform start."""

    def __init__(
        self,
        model: Callable[..., Any],
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ):
        start = "uniform" if random_start else "none"
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, start=start)


class FGSM(_Attack):
    """One step of size eps from the inputs."""

    def __init__(self, model: Callable[..., Any], eps: float = 8 / 255):
        super().__init__(model, eps=eps, alpha=eps, steps=1, start="none")


class PGDL2(_Attack):
    """L2. The start has a normal direction and a length uniform in [0, eps]."""

    def __init__(
        self,
        model: Callable[..., Any],
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
    ):
        start: Start = self._start if random_start else "none"
        super().__init__(model, norm="L2", eps=eps, alpha=alpha, steps=steps, start=start)
        self.eps = eps

    def _start(self, x: Tensor) -> Tensor:
        delta = torch.empty_like(x).normal_()
        norms = delta.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.dim() - 1))
        share = torch.zeros_like(norms).uniform_(0, 1)
        return (x + delta * (share / norms * self.eps)).clamp(0, 1)
