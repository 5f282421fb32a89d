"""Attacks in the shape of torchattacks: `atk = PGD(model, eps=8/255); x_adv = atk(images, labels)`.

PGD, PGDL2 and FGSM return its numbers: they draw starts from torch's generator and differentiate
the plain cross-entropy. APGD and AutoAttack have its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyadv import attacks
from pyadv.engine.attack import Attack
from pyadv.engine.starts import Start


class _Attack:
    attack: type[Attack] = attacks.PGD

    def __init__(self, model: Callable[..., Any], **settings: Any):
        self.model = model
        self._settings = settings
        self.targeted = False

    def set_mode_targeted_by_label(self, quiet: bool = True) -> None:
        """Treat labels as the classes to reach, from now on."""
        self.targeted = True

    def set_mode_default(self) -> None:
        """Treat labels as the classes to leave, from now on."""
        self.targeted = False

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial examples for inputs in [0, 1]."""
        attack = self.attack(
            self.model, targeted=self.targeted, grad_mode="autograd", **self._settings
        )
        return attack(inputs, labels)


class PGD(_Attack):
    """PGD in Linf, from a uniform start."""

    def __init__(
        self,
        model: Callable[..., Any],
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ):
        start = "uniform" if random_start else "none"
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, start=start, scale="exact")


class FGSM(_Attack):
    """FGSM: one step of size eps from the inputs."""

    def __init__(self, model: Callable[..., Any], eps: float = 8 / 255):
        super().__init__(model, eps=eps, alpha=eps, steps=1, start="none", scale="exact")


class PGDL2(_Attack):
    """PGD in L2. The start has a normal direction and a length uniform in [0, eps]."""

    def __init__(
        self,
        model: Callable[..., Any],
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
    ):
        start: Start = self._start if random_start else "none"
        super().__init__(
            model, norm="L2", eps=eps, alpha=alpha, steps=steps, start=start, scale="exact"
        )
        self.eps = eps

    def _start(self, x: Tensor) -> Tensor:
        delta = torch.empty_like(x).normal_()
        norms = delta.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.dim() - 1))
        share = torch.zeros_like(norms).uniform_(0, 1)
        return (x + delta * (share / norms * self.eps)).clamp(0, 1)


class APGD(_Attack):
    """Auto-PGD with noise that depends on `seed` alone: each call returns the same examples.
    Torch's generator is left alone; torchattacks seeds it at each call.

    Args:
        loss: "ce" or "dlr".
    """

    attack = attacks.APGD

    def __init__(
        self,
        model: Callable[..., Any],
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
    ):
        super().__init__(
            model,
            norm=norm,
            eps=eps,
            steps=steps,
            restarts=n_restarts,
            seed=seed,
            loss=loss,
            eot=eot_iter,
            rho=rho,
        )


class AutoAttack:
    """AutoAttack with 100 steps; torchattacks makes 10.

    Args:
        version: "standard", "plus" or "rand".
        n_classes: ignored; the logits have the number of classes.
        seed: None means 0, so that each call returns the same examples.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        norm: str = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        n_classes: int = 10,
        seed: int | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self._attack = attacks.AutoAttack(
            model,
            norm=norm,
            eps=eps,
            version=version,
            seed=seed or 0,
            progress="auto" if verbose else None,
        )

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial examples for inputs in [0, 1]; the input itself if none was found."""
        return self._attack(inputs, labels)
