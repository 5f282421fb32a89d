"""Results of attacks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Perturbed:
    """The result of an attack's steps, without a verdict.

    Attributes:
        x_adv: (B, ...) adversarial examples.
        kappa: (B,) int64 geometry values: how many iterates, start included, the model still
            classified correctly.
        steps: (B,) int64, steps taken.
        queries: (B,) int64, forward passes.
        gradients: (B,) int64, backward passes.
    """

    x_adv: Tensor
    kappa: Tensor
    steps: Tensor
    queries: Tensor
    gradients: Tensor


@dataclass
class AttackResult:
    """An attack's result with the model's verdict on it.

    Attributes:
        x_adv: (B, ...) adversarial examples.
        logits: (B, C), the logits of `x_adv`, for which `run` makes one more forward pass.
        correct: (B,) bool, classified as y; for a targeted attack, not classified as the target.
        loss: (B,), the loss of `x_adv` that the attack maximised.
        kappa, steps, queries, gradients: as in `Perturbed`, including that last forward pass.
        non_finite: (B,) bool, the logits of `x_adv` have NaN or +inf, or are all -inf, so that the
            model gives no answer. Such a sample counts as misclassified.
    """

    x_adv: Tensor
    logits: Tensor
    correct: Tensor
    loss: Tensor
    kappa: Tensor
    steps: Tensor
    queries: Tensor
    gradients: Tensor
    non_finite: Tensor

    @property
    def robust_accuracy(self) -> float:
        """Share of the samples that the attack did not break."""
        return self.correct.float().mean().item()


@dataclass
class MinimumNormResult(AttackResult):
    """The result of an attack that searches for the nearest point that fools the model.

    `correct` is False where a point was found, within eps if the attack has one.

    Attributes:
        distances: (B,), from x to x_adv in the attack's norm: 0 where x itself is not classified as
            y, inf where no point was found.
    """

    distances: Tensor
