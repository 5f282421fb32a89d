"""Step rules: how an attack gets from one iterate to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine.starts import PROJECT
from pyadv.engine.state import PerSample, State
from pyadv.engine.task import FloatOrTensor, memory
from pyadv.menus import AnyNorm
from pyadv.ops.steps import stepper
from pyadv.tensors import broadcastable, compute_dtype, flatten, keep_inactive, per_row, widen

MOMENTUM_STEP: dict[AnyNorm, Callable[..., Tensor]] = {
    "Linf": ops.linf_momentum_step,
    "L2": ops.l2_momentum_step,
}

_Momentum = TypeVar("_Momentum", bound="MomentumRule")


@dataclass
class StepRule(PerSample):
    """The base of step rules. An instance holds settings, and after `begin` a memory with one row
    per sample.

    At step k the loop calls `schedule`, which may wait for nothing and decides nothing by values
    on the device; then come a forward pass, the loss and its input gradient, `observe` and `step`.
    These two see k only through its `kind`: two steps of one kind do the same work on the same
    tensors, so that a recording of one can be replayed for the other. Whatever else varies with k
    is a number that `schedule` writes into a tensor. The memory is written in place; its fields
    have the default `memory()`.

    A rule declares `kind` with the type that its own `kind` returns, and `grad` as a Tensor, or as
    None if it is not `by_gradient`.
    """

    by_gradient: ClassVar[bool] = True  # False: the rule needs no backward pass
    # A method (state, kind, logits, leaf, gradient) -> (direction, its number of backward passes)
    # that replaces the input gradient of the loss, which `gradient()` gives in the same form.
    # `leaf` is the input that the logits (B, C) belong to.
    direction: ClassVar[Callable[..., tuple[Tensor, int]] | None] = None

    @property
    def draws_noise(self) -> bool:
        """Whether steps draw keyed noise."""
        return False

    def begin(self, state: State) -> StepRule:
        """Return the rule with its memory for these samples."""
        return self

    def kind(self, k: int, steps: int) -> Hashable:
        """Return what step k of `steps` does; see above."""
        return "plain"

    def schedule(self, state: State, k: int) -> None:
        """Write the numbers that vary with k into tensors of the rule."""

    def observe(self, state: State, kind: Any, loss: Tensor, grad: Any) -> Tensor | None:
        """Take note of the iterate, its loss (B,) and input gradient; return the gradient to step
        with. The rule may move rows of state.x_adv elsewhere."""
        return grad

    def step(self, state: State, kind: Any, grad: Any, active: Tensor | None) -> None:
        """Write the next iterate into state.x_adv, except for rows that are not active."""
        raise NotImplementedError


def kept(place: Tensor | None, value: Tensor) -> Tensor:
    """Copy `value` into `place`; the first call, with None, makes the place."""
    return value.clone() if place is None else place.copy_(value)


def step_in_place(state: State, grad: Tensor, active: Tensor | None) -> None:
    """Take one step of the settings' norm and size. The graph that saved x_adv is gone by then."""
    s = state.settings
    if state.stepper is None:
        state.stepper = stepper(s.norm, state.x, s.alpha, s.eps, s.lo, s.hi, s.keep)
    state.stepper(state.x_adv, grad, active)


@dataclass
class PlainRule(StepRule):
    """PGD: the step of the norm; with `omega`, normal noise of that standard deviation after it, as
    in friendly PGD."""

    omega: float = 0.0
    number: Tensor = memory()  # of the step, which the noise depends on

    @property
    def draws_noise(self) -> bool:
        return self.omega > 0

    def begin(self, state: State) -> PlainRule:
        return replace(self, number=_scalar(state, torch.int64)) if self.omega else self

    def schedule(self, state: State, k: int) -> None:
        if self.omega:
            self.number.fill_(k + 1)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        step_in_place(state, grad, active)
        if self.omega:
            s, x = state.settings, state.x
            noisy = state.x_adv + self.omega * state.noise.normal(x, step=self.number)
            noisy = PROJECT[s.norm](noisy, x, s.eps, s.lo, s.hi)
            state.x_adv.copy_(keep_inactive(noisy, state.x_adv, active))


@dataclass
class MomentumRule(StepRule):
    """MI-FGSM: the step of the norm along the decaying sum of the gradients, each divided by its
    mean magnitude. A gradient that is zero or not finite adds nothing."""

    decay: float
    total: Tensor = memory()

    def begin(self: _Momentum, state: State) -> _Momentum:
        return replace(self, total=torch.zeros_like(widen(state.x)))

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        g = widen(grad)
        size = per_row(flatten(g).abs().mean(1), g)
        usable = (size > 0) & size.isfinite()
        self.total.mul_(self.decay).add_(torch.where(usable, g / size, 0.0))
        return self.total.to(grad.dtype)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        step_in_place(state, grad, active)


@dataclass
class HalvingRule(StepRule):
    """APGD in Linf and L2: steps with momentum, whose size is halved for the samples that make no
    progress between two checkpoints; those go back to their best iterate.

    The gap between checkpoints is 22 % of the steps, and each time 3 % shorter, down to 6 %. A
    sample makes no progress if the loss rose in at most rho of the steps since the last
    checkpoint, or if its best loss has not risen since then and its step was not halved then.
    """

    rho: float
    zero_first_check: bool  # the official code compares the first iterate with 0, not the start
    factor: Tensor = memory()  # of alpha
    x_prev: Tensor = memory()
    loss_before: Tensor = memory()
    rises: Tensor = memory()  # since the last checkpoint
    loss_at_check: Tensor = memory()  # best loss at the last checkpoint
    halved: Tensor = memory()  # at the last checkpoint
    few: Tensor = memory()  # rises up to which a sample makes no progress

    def begin(self, state: State) -> HalvingRule:
        return replace(
            self,
            factor=_ones(state),
            x_prev=state.x_adv.clone(),
            rises=torch.zeros_like(state.y),
            halved=torch.ones_like(state.active),  # no check has failed before the first
            few=_scalar(state, torch.int64),
        )

    def kind(self, k: int, steps: int) -> str:
        if k == 0:
            return "first"
        return "checkpoint" if k in _checkpoints(steps) else "plain"

    def schedule(self, state: State, k: int) -> None:
        gap = _checkpoints(state.settings.steps).get(k)
        if gap is not None:
            self.few.fill_(math.floor(self.rho * gap))

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        if kind == "first":
            before = torch.zeros_like(loss) if self.zero_first_check else loss
            self.loss_before = kept(self.loss_before, before)
            self.loss_at_check = kept(self.loss_at_check, state.best.loss)
            return grad
        self.rises += loss > self.loss_before
        self.loss_before.copy_(loss)
        return self._check(state, grad) if kind == "checkpoint" else grad

    def _check(self, state: State, grad: Tensor) -> Tensor:
        stuck = ~self.halved & (self.loss_at_check >= state.best.loss)
        torch.logical_or(self.rises <= self.few, stuck, out=self.halved)
        self.loss_at_check.copy_(state.best.loss)
        self.rises.zero_()
        self.factor.copy_(torch.where(self.halved, self.factor / 2, self.factor))
        return back_to_best(state, self.halved, grad)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s = state.settings
        after = MOMENTUM_STEP[s.norm](
            *(state.x_adv, self.x_prev, grad, state.x, _scaled(s.alpha, self.factor, state.x)),
            *(s.eps, 1.0 if kind == "first" else 0.75, s.lo, s.hi, active),
        )
        self.x_prev.copy_(state.x_adv)
        state.x_adv.copy_(after)


@dataclass
class SparseRule(StepRule):
    """APGD in L1: steps on few coordinates, without momentum.

    Every 4 % of the steps, the share of coordinates becomes the share that the best iterate has
    changed, divided by 1.5. Where that has shrunk by more than 5 %, the step gets its first size
    again and the sample goes back to its best iterate; elsewhere the size is divided by 1.5, down
    to a tenth.

    The authors' code spends the share on entries that the box lets no further, too, and never comes
    down from two entries to one; with `published` this rule does so.
    """

    from_start: bool  # the first share too is that of the start, instead of `settings.keep`
    published: bool = False
    factor: Tensor = memory()
    keep: Tensor = memory()
    changed: Tensor = memory()

    def begin(self, state: State) -> SparseRule:
        n = state.x[:1].numel()
        if self.from_start:
            changed = _changed(state.x_adv, state.x)
            keep = self._share(changed, n)
        else:
            changed = torch.full_like(state.y, n)
            keep = torch.full_like(state.y, state.settings.keep, dtype=torch.float32)
        return replace(self, factor=_ones(state), keep=keep, changed=changed)

    def kind(self, k: int, steps: int) -> str:
        gap = max(int(0.04 * steps), 1)
        return "plain" if k == 0 or k % gap else "checkpoint"

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        if kind == "plain":
            return grad
        now = _changed(state.best.x_adv, state.x)
        sparser = now / self.changed < 0.95
        self.changed.copy_(now)
        self.keep.copy_(self._share(now, state.x[:1].numel()))
        self.factor.copy_(torch.where(sparser, 1.0, (self.factor / 1.5).clamp_min(0.1)))
        return back_to_best(state, sparser, grad)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x_adv = state.settings, state.x_adv
        alpha = _scaled(s.alpha, self.factor, state.x)
        ball = s.eps, s.lo, s.hi
        keep = self.keep if self.published else self._with_held(state, grad)
        ops.l1_step(x_adv, grad, state.x, alpha, *ball, active, keep=keep, out=x_adv)

    def _share(self, changed: Tensor, n: int) -> Tensor:
        """Return the share of the coordinates to move next."""
        if self.published:
            return changed / n / 1.5
        return ((changed / 1.5).floor().clamp(min=1) - 0.5) / n  # rounding decides no entry

    def _with_held(self, state: State, grad: Tensor) -> Tensor:
        """Return the share with which `keep` counts only entries that can move: entries that the
        box holds stay among the largest, so that the projection does not take them back, but make
        room for others."""
        s, size, x_adv = state.settings, flatten(widen(grad).abs()), widen(state.x_adv)
        n = size.shape[1]
        if not size.numel():
            return self.keep
        held = torch.zeros_like(x_adv, dtype=torch.bool)
        if s.hi is not None:
            held |= (grad > 0) & (x_adv >= broadcastable(s.hi, x_adv))
        if s.lo is not None:
            held |= (grad < 0) & (x_adv <= broadcastable(s.lo, x_adv))
        free = torch.where(flatten(held), 0.0, size).sort(1, descending=True).values
        place = (self.keep * n).ceil().long().clamp(1, n) - 1
        least = free.gather(1, place[:, None])
        return (((size >= least) & (size > 0)).sum(1).clamp(min=1) - 0.5) / n


def back_to_best(state: State, mask: Tensor, grad: Tensor) -> Tensor:
    """Move the active rows in `mask` to their best iterates, and return the gradients there. The
    result is a new tensor, because `grad` may be the network's."""
    grad_best = state.best.grad
    if grad_best is None:
        raise ValueError("back_to_best needs a rule whose steps are by_gradient")
    here = per_row(mask & state.active, grad)
    state.x_adv.copy_(torch.where(here, state.best.x_adv, state.x_adv))
    return torch.where(here, grad_best, grad)


@lru_cache
def _checkpoints(steps: int) -> dict[int, int]:
    """Return the checkpoints of APGD: for each, the number of steps since the one before."""
    found, gap, k = {}, max(int(0.22 * steps), 1), 0
    while (k := k + gap) <= steps:
        found[k] = gap
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """Count the entries that differ, (B,)."""
    return flatten(x_adv != x).sum(1)


def _ones(state: State) -> Tensor:
    return torch.ones_like(state.y, dtype=compute_dtype(state.x.dtype))


def _scalar(state: State, dtype: torch.dtype) -> Tensor:
    """Return a place for one number, on the device of the samples."""
    return torch.zeros((), dtype=dtype, device=state.x.device)


def _scaled(alpha: FloatOrTensor, factor: Tensor, x: Tensor) -> Tensor:
    """Return alpha times one factor per sample."""
    per_element = isinstance(alpha, Tensor) and alpha.dim() > 1
    return alpha * (per_row(factor, x) if per_element else factor)
