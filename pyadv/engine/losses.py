"""From logits to what the engine needs of them: loss rows, the gradient that enters the network,
and which rows are still classified as y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv import ops, reference

LossFunction = Callable[[Tensor, Tensor], Tensor]

FUSED = ("ce", "margin", "dlr", "kl", "slm")


def check(loss: str | LossFunction) -> str | LossFunction:
    if not callable(loss) and loss not in FUSED:
        raise ValueError(f"loss must be one of {', '.join(FUSED)} or a callable, got {loss!r}")
    return loss


def check_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ValueError(
            f"the attack needs a model with two classes or more, got {logits.shape[1]}"
        )


def ranked_targets(logits: Tensor, y: Tensor, n: int) -> Tensor:
    """(T, B): the classes other than y that the logits rank highest; T is n, or all there are."""
    classes = logits.shape[1]
    known = y.clamp(0, classes - 1)  # the engine refuses other labels
    others = logits.scatter(1, known[:, None], -torch.inf)
    return others.topk(min(n, classes - 1), dim=1).indices.T


@dataclass(frozen=True)
class Loss:
    """loss (B,), maximised by the attack. A targeted attack lowers the loss of its target, which is
    y; "dlr_targeted" and "margin_targeted" lead away from y, to a target of their own."""

    loss: str | LossFunction
    targeted: bool
    grad_mode: str
    scale: str
    confidence: float = 0.0  # what the loss must reach for a row to count as fooled

    def __post_init__(self) -> None:
        if self.grad_mode not in ("fused", "autograd"):
            raise ValueError(f"grad_mode must be fused or autograd, got {self.grad_mode!r}")

    @property
    def by_autograd(self) -> bool:
        return callable(self.loss) or self.grad_mode == "autograd"

    @property
    def needs_reference_logits(self) -> bool:
        return self.loss == "kl"

    def at(
        self,
        logits: Tensor,
        y: Tensor,
        reference_logits: Tensor | None,
        target: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss (B,), gradient (B, C), still (B,) bool): the rows the attack has not fooled yet."""
        if self.by_autograd:
            rows, grad, correct = self._differentiate(logits, y, reference_logits, target)
        else:
            rows, grad, correct = ops.attack_loss(
                logits.detach(), y, self.loss, reference_logits, target, scale=self.scale
            )
        if self.targeted:
            rows, grad, correct = -rows, -grad, ~correct
        return rows, grad, correct | (rows < self.confidence) if self.confidence else correct

    def _differentiate(
        self, logits: Tensor, y: Tensor, reference_logits: Tensor | None, target: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            rows = self._rows(leaf, y, reference_logits, target)
            if not isinstance(rows, Tensor) or rows.shape != y.shape:
                got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(
                    f"loss must return one value per sample, shape [{y.shape[0]}], got {got}; "
                    "a mean would make a sample's gradient depend on its batch"
                )
            (grad,) = torch.autograd.grad(rows.sum(), leaf)
        return rows.detach(), grad, logits.detach().argmax(1) == y

    def _rows(
        self, logits: Tensor, y: Tensor, reference_logits: Tensor | None, target: Tensor | None
    ) -> Tensor:
        if callable(self.loss):
            return self.loss(logits, y)
        if self.loss == "ce":  # as the official codes write it, rounding of 1 - p_y included
            return F.cross_entropy(logits, y, reduction="none")
        if self.loss == "kl":
            q = reference_logits.softmax(1)
            return F.kl_div(logits.log_softmax(1), q, reduction="none").sum(1)
        return reference.attack_loss_value(logits, y, self.loss, target=target)
