"""A penalty on the product of the layers' weight norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyadv.engine import checks
from pyadv.objectives.step import Schedule, Step, at_epoch
from pyadv.ops import NormProduct


class NormPenalty:
    """A regulariser: lam * sum_l log ||W_l||, the logarithm of the product of the layers' norms.

    The product bounds the effective weight norm that `EMR` measures at the data. It needs no second
    derivative and, unlike weight decay, does not change when a factor moves from one layer of a
    ReLU network to the next. It has no minimum of its own, only together with a loss on the data.
    Under BatchNorm a layer's scale is free, and the penalty only changes the effective learning
    rate.

    Args:
        lam: strength, a number or a function of the epoch (from 1).
        product: the `NormProduct` of the model that is trained; it determines the kind of norm
            ("frobenius", "spectral") and the treatment of convolutions.

    Source: WEISSI (Liu, Cui and Chan, "Improve Generalization and Robustness of Neural Networks via
    Weight Scale Shifting Invariant Regularizations", 2020).
    """

    def __init__(self, lam: Schedule, product: NormProduct):
        if not callable(lam):
            checks.size("lam", lam)
        if not isinstance(product, NormProduct):
            raise TypeError(f"product must be a NormProduct, got {type(product).__name__}")
        self.lam, self.product = lam, product

    def __call__(self, step: Step) -> Tensor:
        return at_epoch(self.lam, step.epoch) * self.product()

    def state_dict(self) -> dict[str, Any]:
        return self.product.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.product.load_state_dict(state)
