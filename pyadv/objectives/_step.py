"""One training step as its objective sees it. Forward passes and the attack happen when a part of
the objective asks for them, each at most once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pyadv.attacks import PGD, Perturbed
from pyadv.attacks._model import Output, pick_logits

Schedule = float | Callable[[int], float]


def at_epoch(value: Schedule, epoch: int) -> float:
    """A constant, or a function of the epoch (counted from 1)."""
    return value(epoch) if callable(value) else value


@dataclass
class Step:
    """model, batch and epoch (from 1) of a training step; `attack` None trains on x itself."""

    model: Callable[..., Any]
    x: Tensor
    y: Tensor
    epoch: int
    ids: Tensor | None
    attack: PGD | None
    output: Output = None

    @cached_property
    def perturbed(self) -> Perturbed | None:
        if self.attack is None:
            return None
        return self.attack.perturb(self.x, self.y, self.ids, model=self.model)

    @property
    def x_train(self) -> Tensor:
        """What the network is trained on: the adversarial examples, if there is an attack."""
        return self.x if self.perturbed is None else self.perturbed.x_adv

    @property
    def kappa(self) -> Tensor | None:
        return None if self.perturbed is None else self.perturbed.kappa

    @cached_property
    def logits(self) -> Tensor:
        """Of the clean batch, in the model's own mode."""
        return pick_logits(self.model(self.x), self.output)

    @cached_property
    def logits_adv(self) -> Tensor:
        """Of `x_train`, in the model's own mode."""
        if self.perturbed is None:
            return self.logits
        return pick_logits(self.model(self.perturbed.x_adv), self.output)

    def made(self, name: str) -> Any:
        """`logits` or `logits_adv` if a part of the objective asked for it, else None."""
        return self.__dict__.get(name)
