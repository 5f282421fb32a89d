"""Effective margin regularisation."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks import _checks
from pyadv.attacks._model import borrowed, gradients_on, pick_logits, uncompiled
from pyadv.objectives._step import Schedule, Step, at_epoch


class EMR:
    """lam * R with R = mean_b || sum_k p_bk grad_x z_bk ||^2, p = softmax(z / temperature) held
    fixed: a penalty on the effective weight norm, by double backward through the network in eval
    mode.

    Cross-entropy rewards larger logits, so it can be driven to zero without moving the decision
    boundary away from any sample; R grows with the square of the logits' scale and stops that.

    `objective + EMR(lam)` adds it to any objective, on the adversarial examples, or on x where
    there is no attack. A compiled model is run uncompiled here, since compiled graphs have no
    second derivative.

    Args:
        lam: strength, a number or a function of the epoch (from 1). With reduction="mean" it does
            not depend on the batch size; the official code's lambda is B times this one's (its 3 at
            B = 128 is 0.0234 here).
        temperature: T; towards 0 the gradient of the largest logit, for large T of the mean logit.
        center: subtract the mean logit, so that a change common to all logits costs nothing.
        reduction: "mean" over samples, or "official": divided by B once more.

    Source: Liu and Chan, "Boosting Adversarial Robustness From The Perspective of Effective Margin
    Regularization", BMVC 2022, and its official code.
    """

    def __init__(
        self,
        lam: Schedule,
        temperature: float = 1.0,
        center: bool = False,
        reduction: str = "mean",
    ):
        if not callable(lam):
            _checks.size("lam", lam)
        _checks.choice("reduction", reduction, ("mean", "official"))
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.lam = lam
        self.temperature = temperature
        self.center = center
        self.reduction = reduction

    def __call__(self, step: Step) -> Tensor:
        rows = self.rows(step)
        lam = at_epoch(self.lam, step.epoch)
        return lam * (rows.mean() if self.reduction == "mean" else rows.mean() / rows.shape[0])

    def rows(self, step: Step) -> Tensor:
        """R_b (B,), differentiable with respect to the parameters."""
        model = uncompiled(step.model)
        with gradients_on(), borrowed(model):
            x = step.x_train.detach().requires_grad_()
            logits = pick_logits(model(x), step.output)
            p = ops.softmax_cotangent(logits.detach(), self.temperature, self.center)
            (gradient,) = torch.autograd.grad(logits, x, p, create_graph=True)
        return ops.row_square_sum(gradient)
