"""Terms of a training loss. A term maps a step to one loss per sample (B,); an objective weighs
and averages them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyadv import ops
from pyadv.objectives.step import Schedule, Step, at_epoch
from pyadv.tensors import total

Term = Callable[[Step], Tensor]


def cross_entropy(step: Step) -> Tensor:
    """Return the cross-entropy (B,) at the adversarial examples, or at x without an attack."""
    return ops.weighted_cross_entropy(step.logits_adv, step.y)


def clean_cross_entropy(step: Step) -> Tensor:
    """Return the cross-entropy (B,) at x; 0 for samples without a label."""
    return ops.weighted_cross_entropy(step.logits, step.y, ignore_index=step.ignore_index)


def trades_kl(step: Step) -> Tensor:
    """Return KL(f(x) || f(x_adv)) (B,). Gradients flow through both."""
    return ops.trades_kl(step.logits_adv, step.logits)


class MARTBCE:
    """MART's boosted cross-entropy (B,). `exact` omits the constants of the official code."""

    def __init__(self, exact: bool = False):
        self.exact = exact

    def __call__(self, step: Step) -> Tensor:
        return ops.mart_bce(step.logits_adv, step.y, self.exact)


class MARTKL:
    """MART's term (1 - q_y) KL (B,). See `ops.mart_kl`."""

    def __init__(self, exact: bool = False, detach_weight: bool = False):
        self.exact, self.detach_weight = exact, detach_weight

    def __call__(self, step: Step) -> Tensor:
        return ops.mart_kl(step.logits_adv, step.logits, step.y, self.exact, self.detach_weight)


class Scaled:
    """A term times a factor, which may depend on the epoch."""

    def __init__(self, term: Term, factor: Schedule):
        self.term, self.factor = term, factor

    def __call__(self, step: Step) -> Tensor:
        return at_epoch(self.factor, step.epoch) * self.term(step)


class Sum:
    """The sum of several terms, so that one weighting applies to all of them."""

    def __init__(self, *terms: Term):
        self.terms = terms

    def __call__(self, step: Step) -> Tensor:
        return total(term(step) for term in self.terms)


class Mean:
    """A regulariser: the unweighted mean of a term over the batch, times a factor."""

    def __init__(self, term: Term, factor: Schedule = 1.0):
        self.term = Scaled(term, factor)

    def __call__(self, step: Step) -> Tensor:
        return self.term(step).mean()
