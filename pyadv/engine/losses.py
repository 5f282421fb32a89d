"""Attack losses: loss values, the gradient that enters the network, and which samples are still
classified as y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv import ops, reference
from pyadv._names import did_you_mean
from pyadv.engine import checks
from pyadv.menus import GRAD_MODES, LOSSES, AttackLossName, GradMode, LossName, Scale
from pyadv.reference.losses import has_answer, is_correct

LossFunction = Callable[[Tensor, Tensor], Tensor]


def check(loss: LossName | LossFunction) -> LossName | LossFunction:
    """Return the loss. Raise ValueError if it is neither a callable nor a known name."""
    if not callable(loss) and loss not in LOSSES:
        hint = did_you_mean(loss, LOSSES)
        known = ", ".join(LOSSES)
        raise ValueError(f"loss must be one of {known} or a callable, got {loss!r}{hint}")
    return loss


def check_classes(logits: Tensor) -> None:
    """Raise ValueError if the model has fewer than two classes."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"the attack needs a model with two classes or more, got {logits.shape[1]}"
        )


def ranked_targets(logits: Tensor, y: Tensor, n: int) -> Tensor:
    """Return (T, B): the T classes other than y with the highest logits, T = min(n, C - 1)."""
    classes = logits.shape[1]
    known = y.clamp(0, classes - 1)  # `checks.logits` refuses other labels
    # y is left out of the ranking: at -inf it would tie with the classes that are out of play.
    k = torch.arange(classes - 1, device=y.device)
    others = k + (k >= known[:, None])
    best = logits.gather(1, others).topk(min(n, classes - 1), dim=1).indices
    return others.gather(1, best).T


@dataclass(frozen=True)
class Loss:
    """The loss that an attack maximises. With `targeted`, y is the target and the attack lowers its
    loss. "dlr_targeted" and "margin_targeted" lead away from y to a separate target."""

    loss: AttackLossName | LossFunction
    targeted: bool
    grad_mode: GradMode
    scale: Scale
    confidence: float = 0.0  # the loss at which a sample counts as fooled

    def __post_init__(self) -> None:
        checks.flag("targeted", self.targeted)
        if self.grad_mode not in GRAD_MODES:
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
        """Return loss (B,), its gradient (B, C), and (B,) bool: the samples not fooled yet."""
        if callable(self.loss) or self.by_autograd:
            values, grad, correct = self._differentiate(logits, y, reference_logits, target)
        else:
            values, grad, correct = ops.attack_loss(
                logits.detach(), y, self.loss, reference_logits, target, scale=self.scale
            )
        if self.targeted:
            values, grad, correct = -values, -grad, ~correct
        return values, grad, correct | (values < self.confidence) if self.confidence else correct

    def _differentiate(
        self, logits: Tensor, y: Tensor, reference_logits: Tensor | None, target: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            values = self._values(leaf, y, reference_logits, target)
            if not isinstance(values, Tensor) or values.shape != y.shape:
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"loss must return one value per sample, shape [{y.shape[0]}], got {got}; "
                    "a mean would make a sample's gradient depend on its batch"
                )
            (grad,) = torch.autograd.grad(values.sum(), leaf)
        return self._as_the_op(logits.detach(), y, values.detach(), grad)

    @staticmethod
    def _as_the_op(
        logits: Tensor, y: Tensor, values: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the rules of `ops.attack_loss` for infinite logits: without an answer the loss is
        NaN, and where the loss is not finite or the label is out of play the gradient is 0."""
        values = values.where(has_answer(logits), torch.nan)
        label = y.clamp(0, logits.shape[1] - 1)  # `checks.logits` refuses other labels
        in_play = logits.gather(1, label[:, None])[:, 0] > -torch.inf
        moves = values.isfinite() & in_play
        return values, grad.where(moves[:, None], 0.0), is_correct(logits, y)

    def _values(
        self, logits: Tensor, y: Tensor, reference_logits: Tensor | None, target: Tensor | None
    ) -> Tensor:
        if callable(self.loss):
            return self.loss(logits, y)
        if self.loss == "ce":  # as the official codes write it, including the rounding of 1 - p_y
            return F.cross_entropy(logits, y, reduction="none")
        if self.loss == "kl" and reference_logits is not None:
            q = reference_logits.softmax(1)
            # A class without probability adds 0 to the divergence, also where log p is -inf.
            log_p = logits.log_softmax(1).masked_fill(q == 0, 0.0)
            return F.kl_div(log_p, q, reduction="none").sum(1)
        return reference.attack_loss_value(logits, y, self.loss, target=target)
