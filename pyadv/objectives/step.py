"""One training step as its objective sees it. Forward passes and the attack happen when a part of
the objective asks for them, each at most once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyadv.attacks import Perturbed
from pyadv.engine.attack import GradientAttack
from pyadv.passes.borrow import Output, pick_logits

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
    ids: Tensor | None = None
    attack: GradientAttack | None = None
    output: Output = None
    ignore_index: int | None = None  # the label of samples that have none
    total: int | None = None  # samples of the batch that x is a part of; None: x is all of it
    weights: Tensor | None = None  # (B,), where they are known before the step
    group: Any = None  # of the processes that train the model together, if there are several
    draw: int | None = None  # of the keyed noise; None: the attack's own counter

    @cached_property
    def perturbed(self) -> Perturbed | None:
        if self.attack is None:
            return None
        if self.ignore_index is None:
            return self.perturb(self.attack, self.y)
        labelled = self.y != self.ignore_index
        y = self.y.where(labelled, 0)  # any class: what attacks these does not look at it
        found = self.perturb(self.attack, y)
        return replace(found, kappa=found.kappa.where(labelled, 0))

    def perturb(self, attack: GradientAttack, y: Tensor) -> Perturbed:
        return attack.perturb(self.x, y, self.ids, self.draw, self.model)

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
        return self.forward(self.x)

    @cached_property
    def logits_adv(self) -> Tensor:
        """Of `x_train`, in the model's own mode."""
        return self.logits if self.perturbed is None else self.forward(self.perturbed.x_adv)

    def forward(self, x: Tensor) -> Tensor:
        return pick_logits(self.model(x), self.output)

    @property
    def samples(self) -> int:
        """Of the whole batch."""
        return len(self.x) if self.total is None else self.total

    def need(self, name: str) -> None:
        """Compute `name` now, for what comes after it."""
        getattr(self, name)

    def made(self, name: str) -> Any:
        """`logits` or `logits_adv` if a part of the objective asked for it, else None."""
        return self.__dict__.get(name)

    def again(self, model: Callable[..., Any] | None = None) -> Step:
        """The same step with the same adversarial examples, and forward passes still to come."""
        step = replace(self, model=self.model if model is None else model)
        step.__dict__["perturbed"] = self.perturbed
        return step


@contextlib.contextmanager
def kept_buffers(model: Callable[..., Any]) -> Iterator[None]:
    """Running statistics are afterwards as they were."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


def process_group(model: Callable[..., Any]) -> Any:
    """Of a DistributedDataParallel model with more than one process, else None."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return None
    return model.process_group if dist.get_world_size(model.process_group) > 1 else None
