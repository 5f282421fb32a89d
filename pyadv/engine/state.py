"""The state that the loop carries from step to step: a row for each sample still under attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pyadv.engine.starts import Noise
from pyadv.engine.task import Model, memory
from pyadv.ops.steps import unchecked_keep_best_

if TYPE_CHECKING:
    from pyadv.engine.rules import StepRule

_Self = TypeVar("_Self", bound="PerSample")


@dataclass
class PerSample:
    """A dataclass whose tensors have one row per sample. Tensors without dimensions hold a value
    that all samples share."""

    def select(self: _Self, kept: Tensor) -> _Self:
        """Return a copy with the rows `kept`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {k: v[kept] for k, v in values.items() if isinstance(v, Tensor) and v.dim()}
        return replace(self, **rows)


@dataclass
class Best(PerSample):
    """The iterate of highest loss so far, per sample; NaN counts as lowest."""

    x_adv: Tensor
    loss: Tensor
    grad: Tensor | None

    @classmethod
    def first(cls, x_adv: Tensor, loss: Tensor, grad: Tensor | None) -> Best:
        """Return the best after one iterate, in memory of its own."""
        own = None if grad is None else torch.empty_like(x_adv).copy_(grad)
        return cls(x_adv.clone(), torch.where(loss.isnan(), -torch.inf, loss), own)

    def update(self, x_adv: Tensor, loss: Tensor, grad: Tensor | None) -> None:
        """Take the rows whose loss is higher. `grad` is None at the last iterate, from which no
        step starts, and in a search without gradients."""
        grad_best = None if grad is None else self.grad
        unchecked_keep_best_(loss, x_adv, grad, self.loss, self.x_adv, grad_best)


@dataclass
class State(PerSample):
    """The samples still under attack. Step rules read it, and write `x_adv` and `active` in place.

    Attributes:
        x, x_adv: (B, ...) clean inputs and current iterates.
        y: (B,) labels.
        kappa: (B,) int64, iterates that were classified as y.
        active: (B,) bool, False for samples that have left and are still in the batch.
        patience: (B,) int64, fooled iterates left before a sample is released.
        reference_logits: (B, C) natural logits of a KL attack.
        target: (B,) classes, for a loss that leads to one.
        group: (B,) numbers; all rows of a group are released when one of them is fooled.
        noise: keyed noise, with the ids of these rows.
        settings: with per-sample values for these rows.
        rule: the step rule with its memory.
        queries: (B,) int64, forward passes so far; `eot` passes at one iterate count once.
        gradients: (B,) int64, backward passes so far.
        steps: (B,) int64, steps so far.
        model: the network that is searched, for rules that look at points besides the iterate.
        index: (B,) places of the rows in the batch; None while all of it is here.
        best: the best iterate so far; None unless the settings ask for one.
        still: (B,) bool, classified as y at the current iterate.
        stepper: the step of the norm with checked parameters, made by the rule for these rows.
    """

    x: Tensor
    x_adv: Tensor
    y: Tensor
    kappa: Tensor
    active: Tensor
    patience: Tensor
    reference_logits: Tensor | None
    target: Tensor | None
    group: Tensor | None
    noise: Noise
    settings: Any  # LoopSettings, or the subclass that the rule reads
    rule: StepRule
    queries: Tensor
    gradients: Tensor
    steps: Tensor
    model: Model
    index: Tensor | None = None
    best: Best = memory()
    still: Tensor = memory()
    stepper: Callable[..., None] | None = None

    def select(self, kept: Tensor) -> State:
        """Return the state of the rows `kept`."""
        return replace(
            super().select(kept),
            noise=replace(self.noise, ids=self.noise.ids[kept]),
            settings=self.settings.select(kept, self.x),
            rule=self.rule.select(kept),
            best=self.best and self.best.select(kept),
            stepper=None,
            index=kept if self.index is None else self.index[kept],
        )
