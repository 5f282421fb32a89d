"""Results of attacks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def passes_line(queries: Tensor, gradients: Tensor) -> str:
    """Return the mean numbers of forward and backward passes in words."""
    forward, backward = (t.double().mean().item() for t in (queries, gradients))
    return f"passes per sample: {forward:,.1f} forward, {backward:,.1f} backward"


def samples_line(x_adv: Tensor) -> str:
    """Return how many samples there are, and of which kind."""
    kind = str(x_adv.dtype).removeprefix("torch.")
    return f"{len(x_adv):,} samples of shape {tuple(x_adv.shape[1:])}, {kind} on {x_adv.device}"


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {samples_line(self.x_adv)}"]
        return "\n".join([*lines, passes_line(self.queries, self.gradients)])


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {samples_line(self.x_adv)}"]
        left = int(self.correct.sum())
        lines.append(f"not broken: {left:,} ({100 * self.robust_accuracy:.2f} %)")
        if non_finite := int(self.non_finite.sum()):
            lines.append(f"logits with NaN or +inf, which count as broken: {non_finite:,}")
        lines += self._more_lines()
        return "\n".join([*lines, passes_line(self.queries, self.gradients)])

    def _more_lines(self) -> list[str]:
        return []


@dataclass(repr=False)
class MinimumNormResult(AttackResult):
    """The result of an attack that searches for the nearest point that fools the model.

    `correct` is False where a point was found, within eps if the attack has one.

    Attributes:
        distances: (B,), from x to x_adv in the attack's norm: 0 where x itself is not classified as
            y, inf where no point was found.
    """

    distances: Tensor

    def _more_lines(self) -> list[str]:
        found = self.distances[self.distances.isfinite() & (self.distances > 0)]
        if not len(found):
            return ["distances: no point was found for a sample that is classified correctly"]
        low, middle, high = (found.min(), found.median(), found.max())
        return [
            f"distances of the {len(found):,} points found: least {low:.4g}, median {middle:.4g}, "
            f"greatest {high:.4g}"
        ]
