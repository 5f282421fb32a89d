"""Effective margin regularisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.objectives.step import Schedule, Step, at_epoch
from pyadv.passes.borrow import borrowed, gradients_on, pick_logits, uncompiled, unwrap
from pyadv.passes.tangent import TangentSweep
from pyadv.tensors import per_row

DERIVATIVES = ("tangent", "double", "difference")


class EMR:
    """lam * R with R = mean_b || sum_k p_bk grad_x z_bk ||^2, p = softmax(z / temperature) held
    fixed: a penalty on the effective weight norm, with the network in eval mode.

    Cross-entropy rewards larger logits, so it can be driven to zero without moving the decision
    boundary away from any sample; R grows with the square of the logits' scale and stops that.

    `objective + EMR(lam)` adds it to any objective, on the adversarial examples, or on x where
    there is no attack.

    Args:
        lam: strength, a number or a function of the epoch (from 1). With reduction="mean" it does
            not depend on the batch size; the official code's lambda is B times this one's (its 3 at
            B = 128 is 0.0234 here).
        temperature: T; towards 0 the gradient of the largest logit, for large T of the mean logit.
        center: subtract the mean logit, so that a change common to all logits costs nothing.
        reduction: "mean" over samples, or "official": divided by B once more.
        of: which gradient is penalised.
            "softmax": the one above, of the official code.
            "pairwise": sum_{j != y} q_j || grad_x (z_y - z_j) ||^2, q the softmax at temperature T
            over the classes other than y (ours).
            "jacobian": || grad_x z ||_F^2, all classes alike (ours).
        samples: "pairwise" and "jacobian" sum over C classes, a backward pass each; a number
            estimates that sum without bias from as many random ones (torch's generator).
        derivative: how the parameters' gradient of R, which is a second derivative, is made.
            "tangent": backward through the backward pass, where this is a pass of the tangent
            g = grad_x forward through the network and a product of it and the first pass's
            gradients in each layer.
            "double": the same with autograd's own formulas, for models whose convolutions and
            ReLUs must run as they are; up to twice the time.
            "difference": with g and p held fixed, d||g||^2 = 2 p . dJ g, and J g is a central
            difference: for any model, compiled ones included. The value is exact. The gradient of
            a network linear in pieces also has the effect of the kinks between the two points,
            which the other two leave out.
        radius: L2 distance of the two points of the difference from x; by default the square root
            of the dtype's epsilon (0.0003 in float32): smaller ones round, larger ones meet more
            kinks. A network in half precision rounds too much for it.

    A compiled model is run uncompiled for "tangent" and "double": compiled graphs have no second
    derivatives.

    Source: Liu and Chan, "Boosting Adversarial Robustness From The Perspective of Effective Margin
    Regularization", BMVC 2022, and its official code.
    """

    def __init__(
        self,
        lam: Schedule,
        temperature: float = 1.0,
        center: bool = False,
        reduction: str = "mean",
        of: str = "softmax",
        samples: int | None = None,
        derivative: str = "tangent",
        radius: float | None = None,
    ):
        if not callable(lam):
            checks.size("lam", lam)
        checks.choice("reduction", reduction, ("mean", "official"))
        checks.choice("of", of, ("softmax", "pairwise", "jacobian"))
        checks.choice("derivative", derivative, DERIVATIVES)
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if samples is not None:
            checks.count("samples", samples, 1)
        if radius is not None and not radius > 0:
            raise ValueError(f"radius must be > 0, got {radius}")
        self.lam = lam
        self.temperature = temperature
        self.center = center
        self.reduction = reduction
        self.of = of
        self.samples = samples
        self.derivative = derivative
        self.radius = radius

    def __call__(self, step: Step) -> Tensor:
        mean = self.rows(step).mean()
        lam = at_epoch(self.lam, step.epoch)
        return lam * (mean if self.reduction == "mean" else mean / step.samples)

    def rows(self, step: Step) -> Tensor:
        """R_b (B,), differentiable with respect to the parameters."""
        if self.of == "pairwise" and step.ignore_index is not None:
            raise ValueError('EMR(of="pairwise") needs a label for every sample')
        # A compiled backward pass runs once: several cotangents need several.
        compiled = self.derivative == "difference" and self.of == "softmax"
        model = unwrap(step.model) if compiled else uncompiled(step.model)

        def logits_at(x: Tensor) -> Tensor:
            return pick_logits(model(x), step.output)

        with gradients_on(), borrowed(model):
            x = step.x_train.detach().requires_grad_()
            with TangentSweep() if self.derivative == "tangent" else contextlib.nullcontext():
                logits = logits_at(x)
            cotangents = self._cotangents(logits.detach(), step.y)
            twice = self.derivative != "difference"
            gradients = []
            for i, c in enumerate(cotangents):
                retain = twice or i + 1 < len(cotangents)
                gradients += torch.autograd.grad(
                    logits, x, c, retain_graph=retain, create_graph=twice
                )
            rows = sum(ops.row_square_sum(g) for g in gradients)
            if not twice:
                with torch.autocast(x.device.type, enabled=False):  # too coarse for a difference
                    along = [self._difference(logits_at, x.detach(), g) for g in gradients]
                    twin = 2 * sum((c * d).sum(1) for c, d in zip(cotangents, along, strict=True))
                rows = rows + (twin - twin.detach())
        return rows

    def _cotangents(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """c_i (B, C), constants, with R_b = sum_i || J^T c_i ||^2."""
        classes = logits.shape[1]
        eye = torch.eye(classes, dtype=logits.dtype, device=logits.device)
        if self.of == "softmax":
            return [ops.softmax_cotangent(logits, self.temperature, self.center)]
        if self.of == "jacobian":
            if self.samples is None:
                columns = list(eye)
            else:
                drawn = [torch.randn_like(logits) for _ in range(self.samples)]
                root = (classes / self.samples) ** 0.5
                columns = [root * v / v.norm(dim=1, keepdim=True) for v in drawn]
            rows = [c.expand_as(logits) for c in columns]
            return [c - c.mean(1, keepdim=True) for c in rows] if self.center else rows
        others = logits.scatter(1, y[:, None], -torch.inf)
        q = ops.softmax_cotangent(others, self.temperature)
        if self.samples is None:
            return [q[:, j : j + 1].sqrt() * (eye[y] - eye[j]) for j in range(classes)]
        drawn = torch.multinomial(q.float(), self.samples, replacement=True)
        return [(eye[y] - eye[j]) / self.samples**0.5 for j in drawn.unbind(1)]

    def _difference(self, logits_at: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
        """J g (B, C) by a central difference, in one forward pass of 2 B rows."""
        radius = self.radius or torch.finfo(x.dtype).eps ** 0.5
        length = torch.linalg.vector_norm(g.flatten(1), dim=1)
        unit = g / per_row(length.clamp_min(torch.finfo(g.dtype).tiny), g)
        ahead, behind = logits_at(torch.cat([x + radius * unit, x - radius * unit])).chunk(2)
        return (ahead - behind) * (length / (2 * radius))[:, None]
