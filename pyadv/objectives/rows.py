"""Losses of a training step, one value per sample: what an objective weighs and averages."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyadv import ops
from pyadv.objectives.step import Schedule, Step, at_epoch

Rows = Callable[[Step], Tensor]


def cross_entropy(step: Step) -> Tensor:
    """Cross-entropy (B,) on what the step trains on."""
    return ops.weighted_cross_entropy(step.logits_adv, step.y)


def clean_cross_entropy(step: Step) -> Tensor:
    """Cross-entropy (B,) on x; 0 where there is no label."""
    return ops.weighted_cross_entropy(step.logits, step.y, ignore_index=step.ignore_index)


def trades_kl(step: Step) -> Tensor:
    """KL(f(x) || f(x_adv)) (B,); gradients flow through both."""
    return ops.trades_kl(step.logits_adv, step.logits)


class MARTBCE:
    """MART's boosted cross-entropy (B,); `exact` without the constants of the official code."""

    def __init__(self, exact: bool = False):
        self.exact = exact

    def __call__(self, step: Step) -> Tensor:
        return ops.mart_bce(step.logits_adv, step.y, self.exact)


class MARTKL:
    """MART's (1 - q_y) KL (B,). See `ops.mart_kl`."""

    def __init__(self, exact: bool = False, detach_weight: bool = False):
        self.exact, self.detach_weight = exact, detach_weight

    def __call__(self, step: Step) -> Tensor:
        return ops.mart_kl(step.logits_adv, step.logits, step.y, self.exact, self.detach_weight)


class Scaled:
    """factor * rows; the factor may depend on the epoch."""

    def __init__(self, rows: Rows, factor: Schedule):
        self.rows, self.factor = rows, factor

    def __call__(self, step: Step) -> Tensor:
        return at_epoch(self.factor, step.epoch) * self.rows(step)


class Sum:
    """The sum of several rows, to be weighted together."""

    def __init__(self, *rows: Rows):
        self.rows = rows

    def __call__(self, step: Step) -> Tensor:
        return sum(rows(step) for rows in self.rows)


class Mean:
    """The mean of rows, to add to an objective: a term that is not weighted by sample."""

    def __init__(self, rows: Rows, factor: Schedule = 1.0):
        self.rows = Scaled(rows, factor)

    def __call__(self, step: Step) -> Tensor:
        return self.rows(step).mean()
