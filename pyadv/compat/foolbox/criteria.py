"""What counts as adversarial."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyadv.compat.foolbox.models import unwrapped


class Criterion:
    """The base of criteria; `a & b` holds where both do."""

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        """Return (B,) bool: which perturbed inputs are adversarial, by the model's outputs."""
        raise NotImplementedError

    def __and__(self, other: Criterion) -> Criterion:
        return _Both(self, other)


class _Both(Criterion):
    def __init__(self, a: Criterion, b: Criterion):
        self.a, self.b = a, b

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        return self.a(perturbed, outputs) & self.b(perturbed, outputs)


class Misclassification(Criterion):
    """The predicted class is not the label (B,)."""

    def __init__(self, labels: Any):
        self.labels = unwrapped(labels)[0]

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1) != self.labels


class TargetedMisclassification(Criterion):
    """The predicted class is the target (B,)."""

    def __init__(self, target_classes: Any):
        self.target_classes = unwrapped(target_classes)[0]

    def __call__(self, perturbed: Tensor, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1) == self.target_classes
