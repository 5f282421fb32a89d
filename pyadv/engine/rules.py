"""Step rules: how an attack gets from one iterate to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine.starts import PROJECT
from pyadv.engine.state import Parameter, PerRow, Rows
from pyadv.ops.steps import stepper
from pyadv.tensors import compute_dtype, keep_inactive, per_row, rows, widen

MOMENTUM_STEP = {"Linf": ops.linf_momentum_step, "L2": ops.l2_momentum_step}


def _step_in_place(r: Rows, grad: Tensor, active: Tensor | None) -> None:
    """One step of size alpha. The graph that saved x_adv is gone by now."""
    s = r.settings
    if r.stepper is None:
        r.stepper = stepper(s.norm, r.x, s.alpha, s.eps, s.lo, s.hi, s.keep)
    r.stepper(r.x_adv, grad, active)


@dataclass
class PlainRule(PerRow):
    """PGD: the step of the norm, and the noise `omega` of friendly PGD after it."""

    def begin(self, r: Rows) -> PlainRule:
        return self

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        return grad

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        _step_in_place(r, grad, active)
        s = r.settings
        if s.omega:
            noisy = r.x_adv + s.omega * r.noise.normal(r.x, step=k + 1)
            noisy = PROJECT[s.norm](noisy, r.x, s.eps, s.lo, s.hi)
            r.x_adv.copy_(keep_inactive(noisy, r.x_adv, active))


@dataclass
class MomentumRule(PerRow):
    """MI-FGSM: the step of the norm along the decaying sum of the gradients, each divided by its
    mean magnitude. A gradient that is zero or not finite adds nothing."""

    decay: float
    total: Tensor | None = None

    def begin(self, r: Rows) -> MomentumRule:
        return replace(self, total=torch.zeros_like(widen(r.x)))

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        g = widen(grad)
        size = per_row(rows(g).abs().mean(1), g)
        usable = (size > 0) & size.isfinite()
        self.total = self.decay * self.total + torch.where(usable, g / size, 0.0)
        return self.total.to(grad.dtype)

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        _step_in_place(r, grad, active)


@dataclass
class HalvingRule(PerRow):
    """APGD in Linf and L2: steps with momentum, whose size is halved for the samples that make no
    progress between two checkpoints; those go back to their best iterate.

    The gap between checkpoints is 22 % of the steps, and each time 3 % shorter, down to 6 %. A
    sample makes no progress if the loss rose in at most rho of the steps since the last
    checkpoint, or if its best loss has not risen since then and its step was not halved then.
    """

    rho: float
    zero_first_check: bool  # the official code compares the first iterate with 0, not the start
    factor: Tensor | None = None  # of alpha
    x_prev: Tensor | None = None
    loss_before: Tensor | None = None
    rises: Tensor | None = None  # since the last checkpoint, at which there was
    loss_at_check: Tensor | None = None
    halved: Tensor | None = None
    gap: int = 0
    left: int = 0

    def begin(self, r: Rows) -> HalvingRule:
        gap = max(int(0.22 * r.settings.steps), 1)
        return replace(
            self,
            factor=_ones(r),
            x_prev=r.x_adv.clone(),
            rises=torch.zeros_like(r.y),
            halved=torch.ones_like(r.active),  # so that no progress is no reason at the first one
            gap=gap,
            left=gap,
        )

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        if k == 0:
            self.loss_before = torch.zeros_like(loss) if self.zero_first_check else loss
            self.loss_at_check = r.best.loss.clone()
            return grad
        self.rises += loss > self.loss_before
        self.loss_before = loss
        self.left -= 1
        return grad if self.left else self._check(r, grad)

    def _check(self, r: Rows, grad: Tensor) -> Tensor:
        stuck = ~self.halved & (self.loss_at_check >= r.best.loss)
        self.halved = (self.rises <= self.rho * self.gap) | stuck
        self.loss_at_check = r.best.loss.clone()
        self.rises = torch.zeros_like(self.rises)
        self.factor = torch.where(self.halved, self.factor / 2, self.factor)
        steps = r.settings.steps
        self.gap = max(self.gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        self.left = self.gap
        return _back_to_best(r, self.halved, grad)

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        s = r.settings
        MOMENTUM_STEP[s.norm](
            *(r.x_adv, self.x_prev, grad, r.x, _scaled(s.alpha, self.factor, r.x), s.eps),
            *(0.75 if k else 1.0, s.lo, s.hi, active),
            out=self.x_prev,
        )
        r.x_adv, self.x_prev = self.x_prev, r.x_adv


@dataclass
class SparseRule(PerRow):
    """APGD in L1: steps on few coordinates, without momentum.

    Every 4 % of the steps, the share of coordinates becomes the share that the best iterate has
    changed, divided by 1.5. Where that has shrunk by more than 5 %, the step gets its first size
    again and the sample goes back to its best iterate; elsewhere the size is divided by 1.5, down
    to a tenth.
    """

    from_start: bool  # the first share too is that of the start, instead of `settings.keep`
    factor: Tensor | None = None
    keep: Tensor | None = None
    changed: Tensor | None = None
    gap: int = 0

    def begin(self, r: Rows) -> SparseRule:
        n = r.x[:1].numel()
        if self.from_start:
            changed = _changed(r.x_adv, r.x)
            keep = changed / n / 1.5
        else:
            changed = torch.full_like(r.y, n)
            keep = torch.full_like(r.y, r.settings.keep, dtype=torch.float32)
        return replace(
            self,
            factor=_ones(r),
            keep=keep,
            changed=changed,
            gap=max(int(0.04 * r.settings.steps), 1),
        )

    def observe(self, r: Rows, k: int, loss: Tensor, grad: Tensor) -> Tensor:
        if k == 0 or k % self.gap:
            return grad
        before, self.changed = self.changed, _changed(r.best.x_adv, r.x)
        sparser = self.changed / before < 0.95
        self.keep = self.changed / r.x[:1].numel() / 1.5
        self.factor = torch.where(sparser, 1.0, (self.factor / 1.5).clamp_min(0.1))
        return _back_to_best(r, sparser, grad)

    def step(self, r: Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
        s = r.settings
        alpha = _scaled(s.alpha, self.factor, r.x)
        ops.l1_step(
            r.x_adv, grad, r.x, alpha, s.eps, s.lo, s.hi, active, keep=self.keep, out=r.x_adv
        )


def _back_to_best(r: Rows, mask: Tensor, grad: Tensor) -> Tensor:
    """Among the active rows; the new gradients. Out of place: `grad` may be the network's."""
    here = per_row(mask & r.active, grad)
    r.x_adv = torch.where(here, r.best.x_adv, r.x_adv)
    return torch.where(here, r.best.grad, grad)


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    return rows(x_adv != x).sum(1)


def _ones(r: Rows) -> Tensor:
    return torch.ones_like(r.y, dtype=compute_dtype(r.x.dtype))


def _scaled(alpha: Parameter, factor: Tensor, x: Tensor) -> Tensor:
    """alpha times one factor per sample."""
    per_element = isinstance(alpha, Tensor) and alpha.dim() > 1
    return alpha * (per_row(factor, x) if per_element else factor)
