"""Effective margin regularisation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.menus import (
    DERIVATIVES,
    PENALTIES,
    REDUCTIONS,
    Derivative,
    PenaltyName,
    Reduction,
)
from pyadv.objectives.step import Schedule, Step, at_epoch
from pyadv.passes.borrow import (
    borrowed,
    gradients_on,
    is_sharded,
    pick_logits,
    uncompiled,
    unwrap,
)
from pyadv.passes.tangent import TangentSweep
from pyadv.tensors import per_row, row_norm, total


class EMR:
    """A regulariser: lam * mean_b || sum_k p_bk grad_x z_bk ||^2 with the network in eval mode.

    z are the logits and p = softmax(z / temperature), held fixed. The sum is the gradient of the
    logit that the network expects, and its norm is the effective weight norm. Cross-entropy rewards
    larger logits, so training can drive it to zero without moving the decision boundary away from
    any sample; the penalty grows with the square of the logits' scale and prevents that.

    `objective + EMR(lam)` adds it to any objective, at the adversarial examples, or at x if there
    is no attack.

    Args:
        lam: strength, a number or a function of the epoch (from 1). With reduction="mean" it does
            not depend on the batch size; the official code's lambda is B times as large (its 3 at
            B = 128 is 0.0234 here).
        temperature: T, a number > 0. Towards 0 the penalty is on the largest logit, for large T on
            the mean logit.
        center: subtract the mean logit, so that a change common to all logits costs nothing.
        reduction: "mean" over samples, or "official": divided once more by the size of the whole
            batch, over all processes and micro-batches.
        of: the gradient that is penalised.
            "softmax": the one above, as in the official code.
            "pairwise": sum_{j != y} q_j || grad_x (z_y - z_j) ||^2, q the softmax at temperature T
            over the classes other than y (ours).
            "jacobian": || grad_x z ||_F^2, all classes alike (ours).
        samples: "pairwise" and "jacobian" sum over C classes, with a backward pass each. A number
            estimates that sum without bias from as many random terms (torch's generator).
        derivative: how the gradient of the penalty with respect to the parameters, a second
            derivative, is computed.
            "tangent": backward through the backward pass, written as a forward pass of the tangent
            g = grad_x and a product with the first pass's gradients in each layer.
            "double": the same with autograd's own formulas, for models whose convolutions and
            ReLUs must run unchanged; up to twice the time.
            "difference": with g and p held fixed, d||g||^2 = 2 p . dJ g, and J g is a central
            difference: for any model, compiled ones included. The value is exact. For a piecewise
            linear network the gradient includes kinks between the two points, which the other
            two leave out.
        radius: L2 distance from x of the two points of the difference. The default is the square
            root of the dtype's epsilon (0.0003 in float32). Smaller distances lose precision,
            larger ones meet more kinks. Half precision is too coarse for a difference.

    "tangent" and "double" run a compiled model uncompiled, because compiled graphs have no second
    derivatives. A model that FSDP shards needs "difference". A network that sets its own mode in
    `forward`, as the official ones do, needs `pyadv.compat.emr.official`.

    Source: Liu and Chan, "Boosting Adversarial Robustness From The Perspective of Effective Margin
    Regularization", BMVC 2022, and its official code.
    """

    def __init__(
        self,
        lam: Schedule,
        temperature: float = 1.0,
        center: bool = False,
        reduction: Reduction = "mean",
        of: PenaltyName = "softmax",
        samples: int | None = None,
        derivative: Derivative = "tangent",
        radius: float | None = None,
    ):
        if not callable(lam):
            checks.size("lam", lam)
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.choice("of", of, PENALTIES)
        checks.choice("derivative", derivative, DERIVATIVES)
        temperature = _positive("temperature", temperature)
        if samples is not None:
            checks.count("samples", samples, 1)
        if radius is not None:
            radius = _positive("radius", radius)
        self.lam = lam
        self.temperature = temperature
        self.center = center
        self.reduction = reduction
        self.of = of
        self.samples = samples
        self.derivative = derivative
        self.radius = radius

    def __call__(self, step: Step) -> Tensor:
        mean = self.per_sample(step).mean()
        if self.reduction == "official":
            mean = mean / step.samples_everywhere
        return at_epoch(self.lam, step.epoch) * mean

    def per_sample(self, step: Step) -> Tensor:
        """Return the penalty of each sample (B,), differentiable with respect to the parameters."""
        if self.of == "pairwise" and step.ignore_index is not None:
            raise ValueError('EMR(of="pairwise") needs a label for every sample')
        if self.derivative != "difference" and is_sharded(step.model):
            raise ValueError(
                'EMR: derivative must be "difference" for a model that FSDP shards, which frees '
                f'parameters before a second derivative reads them, got "{self.derivative}"'
            )
        # A compiled backward pass runs only once, and several cotangents need several.
        compiled = self.derivative == "difference" and self.of == "softmax"
        model = unwrap(step.model) if compiled else uncompiled(step.model)

        def logits_at(x: Tensor) -> Tensor:
            return pick_logits(model(x), step.output, len(x))

        with gradients_on(), borrowed(model):
            x = step.x_train.detach().requires_grad_()
            with TangentSweep() if self.derivative == "tangent" else contextlib.nullcontext():
                logits = logits_at(x)
            cotangents = self._cotangents(logits.detach(), step.y)
            twice = self.derivative != "difference"
            gradients: list[Tensor] = []
            for i, c in enumerate(cotangents):
                retain = twice or i + 1 < len(cotangents)
                gradients += torch.autograd.grad(
                    logits, x, c, retain_graph=retain, create_graph=twice
                )
            penalties = total(ops.row_square_sum(g) for g in gradients)
            if not twice:
                with torch.autocast(x.device.type, enabled=False):  # too coarse for a difference
                    along = [self._difference(logits_at, x.detach(), g) for g in gradients]
                    terms = zip(cotangents, along, strict=True)
                    twin = 2 * total((c * d).sum(1) for c, d in terms)
                penalties = penalties + (twin - twin.detach())
        return penalties

    def _cotangents(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """Return constants c_i (B, C) such that the penalty is sum_i || J^T c_i ||^2."""
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
            found = [c.expand_as(logits) for c in columns]
            return [c - c.mean(1, keepdim=True) for c in found] if self.center else found
        others = logits.scatter(1, y[:, None], -torch.inf)
        q = ops.softmax_cotangent(others, self.temperature)
        if self.samples is None:
            return [q[:, j : j + 1].sqrt() * (eye[y] - eye[j]) for j in range(classes)]
        picked = torch.multinomial(q.float(), self.samples, replacement=True)
        return [(eye[y] - eye[j]) / self.samples**0.5 for j in picked.unbind(1)]

    def _difference(self, logits_at: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
        """Return J g (B, C) by a central difference: one forward pass of 2 B samples."""
        radius = self.radius or torch.finfo(x.dtype).eps ** 0.5
        length = row_norm(g, 2)
        unit = g / per_row(length.clamp_min(torch.finfo(g.dtype).tiny), g)
        ahead, behind = logits_at(torch.cat([x + radius * unit, x - radius * unit])).chunk(2)
        return (ahead - behind) * (length / (2 * radius))[:, None]


def _positive(name: str, value: float | Tensor) -> float:
    """Return a number > 0, or raise an error that names it."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a number > 0, got {got}")
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return float(value)
