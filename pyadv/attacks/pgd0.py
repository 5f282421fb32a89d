"""Projected gradient descent in L0 (Croce and Hein, "Sparse and Imperceivable Adversarial Attacks",
ICCV 2019)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyadv.attacks.minimum_norm import box_width
from pyadv.engine import checks
from pyadv.engine.attack import Attack, Plan, functional, show
from pyadv.engine.losses import Loss, LossFunction
from pyadv.engine.losses import check as check_loss
from pyadv.engine.rules import StepRule
from pyadv.engine.settable import Setting
from pyadv.engine.starts import AnyStart, GeneratorNoise, Noise, StartFunction
from pyadv.engine.state import State
from pyadv.engine.task import FloatOrTensor, LoopSettings, Model, Task, memory
from pyadv.menus import BESTS, AnyNorm, Auto, Best, LossName, Speed
from pyadv.passes.borrow import Output
from pyadv.tensors import clip_to_box, flatten, keep_inactive, largest, per_row, widen

StartName: TypeAlias = Literal["keyed", "none"]
STARTS: tuple[StartName, ...] = get_args(StartName)


class PGD0(Attack):
    """K steps of gradient ascent on the loss, each projected onto the points that differ from x in
    at most `eps` entries, or pixels, inside the box.

    The steps are long, so that an entry that changes mostly goes to a bound of the box; the
    projection, which is exact, keeps the entries that lose most by going back to x. `attack(x, y)`
    costs at most `steps + 1` forward passes and `steps` input gradients per restart. The module,
    its state and torch's generator are afterwards as they were, as with `PGD`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        eps: number of entries that may change, or of pixels; a whole number, or one per sample
            (B,).
        pixels: count pixels of images (B, C, H, W), whose channels change together, instead of
            entries.
        alpha: mean length of a step per entry, in units of the box's width (of x, if lo and hi are
            not both numbers). With long steps the projection keeps the entries with the largest
            product of gradient and room in the box.
        steps: number of steps.
        loss: what is maximised: "margin", "ce", "dlr", "slm", or a callable (logits, y) -> (B,).
        start: "keyed" (uniform in the box and then projected, the same for a sample whatever batch
            it comes in), "none", or a callable x -> first iterate, which is projected.
        restarts: independent starts, run as one batch.
        best: as in `PGD`.
        targeted: y is the class to reach.
        lo, hi: the box inputs lie in; None for no bound.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact, output, validate, speed, graph: as in `PGD`.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits.

    Source: PGD_0 of that paper: a step along the gradient, then the projection onto the L0 ball
    inside the box. Start, step length and default loss are ours.
    """

    settings: LoopSettings

    _rule = Setting("settings.rule")

    def __init__(
        self,
        model: Model | None = None,
        *,
        eps: FloatOrTensor = 10,
        pixels: bool = False,
        alpha: float = 10.0,
        steps: int = 100,
        loss: LossName | LossFunction = "margin",
        start: StartName | StartFunction = "keyed",
        restarts: int = 1,
        best: Best = "fooled",
        targeted: bool = False,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        seed: int | None = None,
        compact: Auto = "auto",
        output: Output = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
        graph: Auto = "auto",
    ):
        _check_count(eps)
        checks.size("alpha", alpha, tensor=False)
        checks.choice("pixels", pixels, (True, False))
        checks.choice("best", best, BESTS)
        if not callable(start):
            checks.choice("start", start, STARTS)
        if loss == "kl":
            raise ValueError('loss="kl" belongs to PGD: it is zero at x and knows no label')
        settings = LoopSettings(
            norm="L0",
            eps=eps,
            steps=steps,
            loss=Loss(check_loss(loss), targeted, "fused", "unit"),
            start=start,
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            rule=SparsestRule(alpha * box_width(lo, hi), pixels),
            patience=0 if best == "fooled" else steps,
            start_from=_Start(pixels),
            best=best,
        )
        super().__init__(model, settings, restarts, seed, graph)

    def _search_words(self) -> list[str]:
        s = self.settings
        of = ["pixels"] if self._rule.pixels else []
        return [*of, f"{s.steps} steps", f"loss {show(s.loss.loss)}"]

    def _plan(self, task: Task) -> Plan:
        if self._rule.pixels and task.x.dim() != 4:
            got = list(task.x.shape)
            raise ValueError(f"pixels=True needs images (B, C, H, W), got x of shape {got}")
        return super()._plan(task)


@dataclass
class SparsestRule(StepRule):
    """The rule of PGD0: a step along the gradient, then the projection."""

    alpha: float
    pixels: bool
    count: Tensor = memory()  # (B,)

    def begin(self, state: State) -> SparsestRule:
        return replace(self, count=_counts(state.settings.eps, state.x))

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s, x, g = state.settings, widen(state.x), widen(grad)
        mean = flatten(g).abs().mean(1) if g[:1].numel() else g.new_zeros(len(g))
        usable = (mean > 0) & mean.isfinite()
        move = torch.where(per_row(usable, g), g / per_row(mean, g), 0.0)
        point = widen(state.x_adv) + self.alpha * move
        point = l0_project(point, x, self.count, s.lo, s.hi, self.pixels).to(state.x.dtype)
        state.x_adv.copy_(keep_inactive(point, state.x_adv, active))


def l0_project(
    point: Tensor,
    x: Tensor,
    count: Tensor,
    lo: FloatOrTensor | None,
    hi: FloatOrTensor | None,
    pixels: bool = False,
) -> Tensor:
    """Return the nearest point of the box that differs from x in at most `count` (B,) entries, or
    pixels. An entry of offset d that the box clips to c is c^2 - 2 c d nearer when it changes."""
    inside = clip_to_box(point, lo, hi)
    offset, clipped = point - x, inside - x
    gain = clipped * (2 * offset - clipped)
    if pixels:
        gain = gain.sum(1, keepdim=True)
    return torch.where(largest(gain, count) & (gain > 0), inside, x)


@dataclass(frozen=True)
class _Start:
    """The first iterate of PGD0."""

    pixels: bool

    def __call__(
        self,
        kind: AnyStart,
        norm: AnyNorm,
        x: Tensor,
        eps: FloatOrTensor,
        lo: FloatOrTensor | None,
        hi: FloatOrTensor | None,
        noise: Noise | GeneratorNoise,
    ) -> Tensor:
        wide = widen(x)
        if callable(kind):
            point = widen(kind(x).detach())
            if point.shape != x.shape:
                raise ValueError(
                    f"attack: start must return the shape of x, {list(x.shape)}, "
                    f"got {list(point.shape)}"
                )
        elif kind == "none":
            return torch.empty_like(x).copy_(x)
        else:
            width = box_width(lo, hi)
            point = wide + width * (2 * noise.uniform(wide) - 1)
        point = l0_project(point, wide, _counts(eps, x), lo, hi, self.pixels)
        return torch.empty_like(x).copy_(point)


def _counts(eps: FloatOrTensor, x: Tensor) -> Tensor:
    """Return the number of entries or pixels for each sample, (B,)."""
    wide = widen(x)
    return torch.as_tensor(eps, dtype=wide.dtype, device=x.device).expand(len(x)).clone()


def _check_count(eps: FloatOrTensor) -> None:
    if isinstance(eps, Tensor):
        if eps.dim() > 1:
            raise ValueError(
                f"eps must be one count or one per sample (B,), got shape {list(eps.shape)}"
            )
        whole = not eps.is_floating_point() or bool((eps == eps.floor()).all())
    else:
        checks.size("eps", eps)
        whole = eps == int(eps)
    if not whole:
        raise ValueError(f"eps must count entries or pixels: a whole number, got {eps}")


pgd0 = functional("pgd0", PGD0)
