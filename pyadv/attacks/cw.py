"""The attack of Carlini and Wagner in L2 ("Towards Evaluating the Robustness of Neural Networks",
IEEE S&P 2017)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import ClassChoice, ClassRule, NearestIterate, class_choice, rounded
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.norms import distance
from pyadv.engine.rules import kept
from pyadv.engine.settable import Setting
from pyadv.engine.state import State
from pyadv.engine.task import Model, Settings, memory
from pyadv.tensors import broadcastable, clip_to_box, flatten, per_row, widen

_INSIDE = 0.99  # the first |tanh(w)| of entries on a bound, where tanh is flat
_MOST = 1 - 1e-6  # the largest |tanh(w)|: beyond it the slope rounds to 0
_BETA1, _BETA2, _ADAM_TINY = 0.9, 0.999, 1e-8
_NO_PROGRESS = 0.9999


class CW(NearestIterate):
    """The nearest point in L2, by descent on distance and margin together:

        ||x_adv - x||^2 + c max(confidence - m, 0),  m = max_{j != y} z_j - z_y

    (in units of the box's width) over w, where x_adv is lo + (hi - lo) (tanh(w) + 1) / 2, by Adam;
    without two bounds w is x_adv itself. c is found by binary search: it is ten times as large
    after a search without success, until one has succeeded, and then halves the interval. Each
    sample has its own c, Adam state and end.

    `attack(x, y)` gives the nearest iterate with m >= confidence, x itself where there is none;
    `attack.run(x, y)` a `MinimumNormResult`. It costs at most `searches * steps + 1` forward passes
    and `searches * steps` input gradients. The module and its state are afterwards as they were, as
    with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        steps: of each search.
        searches: number of searches over c.
        confidence: the margin m that counts as a success, in units of the logits; >= 0.
        lr: Adam's step size, in units of w.
        c: the first weight of the margin.
        abort_early: end a search in which a tenth of the steps has not lowered the objective by
            0.01 %.
        classes: which wrong class m and the descent look at until a point is found, as in `DDN`;
            "runner-up" is the m above, as the authors have it.
        targeted: y is the class to reach, and m is z_y - max_{j != y} z_j.
        eps, lo, hi, compact, output, validate, speed: as in `FAB`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: section VI.A, and the authors' code for Adam, the ends and the binary search. There a
    search ends for the whole batch, and takes 10,000 steps; and entries on the bounds start at
    0.999999 of the way from the middle, from where they hardly move, here at 0.99 (x_adv still
    starts at x itself, and such entries reach 99.5 % of the box).
    """

    _rule = Setting("settings.rule")
    steps = Setting("settings.rule.steps")  # steps of each search

    def __init__(
        self,
        model: Model | None = None,
        *,
        steps: int = 1000,
        searches: int = 9,
        confidence: float = 0.0,
        lr: float = 0.01,
        c: float = 0.001,
        abort_early: bool = True,
        classes: ClassChoice = "nearest",
        targeted: bool = False,
        **settings: Any,
    ):
        checks.count("steps", steps, 1)
        checks.count("searches", searches, 1)
        for name, value in (("confidence", confidence), ("lr", lr), ("c", c)):
            checks.size(name, value, tensor=False)
        super().__init__(
            model,
            norm="L2",
            steps=searches * steps,
            loss="margin",
            confidence=confidence,
            rule=SearchRule(class_choice(classes, targeted), searches, steps, lr, c, abort_early),
            targeted=targeted,
            **settings,
        )

    def _search_words(self) -> list[str]:
        rule, confidence = self._rule, self.settings.loss.confidence
        words = [f"{rule.searches} searches of {rule.steps} steps"]
        return [*words, f"confidence {confidence:g}"] if confidence else words


@dataclass
class SearchRule(ClassRule):
    """The rule of CW: it runs its searches one after the other, each from x by Adam, and computes
    the gradient at x once."""

    searches: int
    steps: int
    lr: float
    first_c: float
    abort_early: bool
    c: Tensor = memory()
    lower: Tensor = memory()
    upper: Tensor = memory()
    done: Tensor = memory()  # finished searches
    age: Tensor = memory()  # steps taken in this search
    found: Tensor = memory()  # whether this search has fooled the model
    before: Tensor = memory()  # the objective at the last check
    width: Tensor = memory()  # (B,) width of the box
    loss: Tensor = memory()
    loss_at_x: Tensor = memory()
    grad_at_x: Tensor = memory()
    place: Tensor = memory()  # tanh(w), or x_adv - x if a bound is missing
    place_of_x: Tensor = memory()
    mean: Tensor = memory()  # Adam's running means of the gradient and of its square
    square: Tensor = memory()
    decay1: Tensor = memory()  # the powers of beta1 and beta2
    decay2: Tensor = memory()

    def begin(self, state: State) -> SearchRule:
        x, s = widen(state.x), state.settings
        place, width = torch.zeros_like(x), torch.ones_like(x)
        if _bounded(s):
            half = _half_width(s, x).expand_as(x)
            place = torch.where(half > 0, (x - broadcastable(s.lo, x)) / half - 1, 0.0)
            place, width = place.clamp(-_INSIDE, _INSIDE), 2 * half
        width = flatten(width).amax(1) if math.prod(x.shape[1:]) else x.new_ones(len(x))
        return replace(
            self,
            c=torch.full_like(width, self.first_c),
            lower=torch.zeros_like(width),
            upper=torch.full_like(width, torch.inf),
            done=torch.zeros_like(state.y),
            age=torch.zeros_like(state.y),
            found=torch.zeros_like(state.active),
            before=torch.zeros_like(width),
            width=torch.where(width > 0, width, 1.0),
            loss=torch.zeros_like(width),
            loss_at_x=torch.zeros_like(width),
            place=place,
            place_of_x=place.clone(),
            mean=torch.zeros_like(x),
            square=torch.zeros_like(x),
            decay1=torch.ones_like(width),
            decay2=torch.ones_like(width),
        )

    def kind(self, k: int, steps: int) -> str:
        return "plain" if k else "choose"

    def observe(self, state: State, kind: Hashable, loss: Tensor, grad: Tensor) -> Tensor:
        self.loss.copy_(self.margin(loss))
        if kind == "choose":
            self.loss_at_x.copy_(self.loss)
            self.grad_at_x = kept(self.grad_at_x, grad)
            self.before.copy_(self.c * self._hinge(state))
            return grad
        self.found |= ~state.still
        away = distance(state.x_adv, state.x, "L2") / self.width
        objective = away.square() + self.c * self._hinge(state)
        check = self.age % max(self.steps // 10, 1) == 0
        ended = self.age == self.steps
        if self.abort_early:
            ended |= check & (objective > _NO_PROGRESS * self.before)
        _replace(self.before, check, objective)
        if ended.is_cpu and not ended.any():  # reading this on a GPU would wait for it
            return grad
        return self._next_search(state, ended, grad)

    def _next_search(self, state: State, ended: Tensor, grad: Tensor) -> Tensor:
        """Send the rows whose search has ended back to x with another c; return the gradients to
        step with."""
        _replace(self.upper, ended & self.found, self.c)
        _replace(self.lower, ended & ~self.found, self.c)
        middle = torch.where(self.upper < torch.inf, (self.lower + self.upper) / 2, 10 * self.c)
        _replace(self.c, ended, middle)
        self.done += ended
        state.active &= self.done < self.searches
        _replace(self.age, ended, 0)
        self.found &= ~ended
        _replace(self.loss, ended, self.loss_at_x)
        _replace(self.before, ended, self.c * self._hinge(state))
        here = per_row(ended, grad)
        _replace(self.place, here, self.place_of_x)
        for moment in (self.mean, self.square):
            _replace(moment, here, 0.0)
        for power in (self.decay1, self.decay2):
            _replace(power, ended, 1.0)
        return torch.where(here, self.grad_at_x, grad)

    def _hinge(self, state: State) -> Tensor:
        return (state.settings.loss.confidence - self.loss).clamp(min=0)

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x, grad = state.settings, widen(state.x), widen(grad)
        usable = (self._hinge(state) > 0) & flatten(grad).isfinite().all(1)
        grad = torch.where(per_row(usable, x), per_row(-self.c, x) * grad, 0.0)
        grad = grad + 2 * self._offset(s) / per_row(self.width.square(), x)
        if _bounded(s):
            grad = grad * _half_width(s, x) * (1 - self.place.square())
            self.place.copy_(_tanh_of_sum(self.place, self._adam(grad)))
        else:
            self.place.copy_(clip_to_box(x + self.place + self._adam(grad), s.lo, s.hi) - x)
        point = clip_to_box(x + self._offset(s), s.lo, s.hi)
        state.x_adv.copy_(rounded(point, state.x, s.lo, s.hi))

    def _offset(self, s: Settings) -> Tensor:
        """Return x_adv - x, exactly 0 where nothing has moved."""
        if _bounded(s):
            return _half_width(s, self.place) * (self.place - self.place_of_x)
        return self.place

    def _adam(self, grad: Tensor) -> Tensor:
        """Return the step of w."""
        self.age += 1
        self.decay1 *= _BETA1
        self.decay2 *= _BETA2
        seen1, seen2 = per_row(1 - self.decay1, grad), per_row(1 - self.decay2, grad)
        self.mean.mul_(_BETA1).add_((1 - _BETA1) * grad)
        self.square.mul_(_BETA2).add_((1 - _BETA2) * grad.square())
        return -self.lr / seen1 * self.mean / ((self.square / seen2).sqrt() + _ADAM_TINY)


def _replace(place: Tensor, mask: Tensor, value: Tensor | float) -> None:
    """Write `value` into `place` where the mask is True."""
    place.copy_(torch.where(mask, value, place))


def _bounded(s: Settings) -> bool:
    return s.lo is not None and s.hi is not None


def _tanh_of_sum(tanh: Tensor, step: Tensor) -> Tensor:
    """Return tanh(w + step) from tanh(w), by the addition theorem and a Pade approximation for the
    step (relative error step^6 / 1575). Unlike torch's tanh and atanh on a CPU it rounds every
    entry alike, wherever in the tensor it lies, so that no sample depends on its batch."""
    step = step.clamp(-2, 2)
    square = step * step
    part = step * (15 + square) / (15 + 6 * square)
    return ((tanh + part) / (1 + tanh * part)).clamp(-_MOST, _MOST)


def _half_width(s: Any, like: Tensor) -> Tensor:
    return (broadcastable(s.hi, like) - broadcastable(s.lo, like)) / 2


cw = functional("cw", CW)
