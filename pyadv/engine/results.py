from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Perturbed:
    """What the steps of an attack leave behind: `x_adv` with, for each sample, the geometry value
    `kappa` (how many iterates, start included, were still classified correctly), the number of
    `steps` taken, of `queries` (forward passes) and of `gradients` (backward passes); the last four
    (B,) int64."""

    x_adv: Tensor
    kappa: Tensor
    steps: Tensor
    queries: Tensor
    gradients: Tensor


@dataclass
class AttackResult:
    """An attack and how it ended.

    `logits` (B, C), `correct` (B,) bool and `loss` (B,) are those of `x_adv` itself: one forward
    pass more than the attack needs. `correct` is always "classified as y" and, for a targeted
    attack, "not yet classified as the target"; `loss` is what the attack maximised. `kappa`,
    `steps`, `queries` and `gradients` as in `Perturbed`, this last forward pass included.
    """

    x_adv: Tensor
    logits: Tensor
    correct: Tensor
    loss: Tensor
    kappa: Tensor
    steps: Tensor
    queries: Tensor
    gradients: Tensor

    @property
    def robust_accuracy(self) -> float:
        """The share of samples that the attack did not break."""
        return self.correct.float().mean().item()


@dataclass
class MinimumNormResult(AttackResult):
    """An attack that looks for the nearest point that fools the model.

    `distances` (B,) from x to x_adv in the attack's norm: 0 where x itself is not classified as y,
    inf where no point was found. `correct` is False where a point was found, within eps if the
    attack has one.
    """

    distances: Tensor
