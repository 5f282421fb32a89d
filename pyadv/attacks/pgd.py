"""Projected gradient descent: PGD (Madry et al., ICLR 2018) and its early-stopped form, friendly
PGD (Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML
2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks import _checks
from pyadv.attacks._engine import Parameter, Settings, judge, search
from pyadv.attacks._losses import Loss, LossFunction
from pyadv.attacks._model import Output
from pyadv.attacks._result import AttackResult, Perturbed
from pyadv.attacks._start import STARTS, Noise, Start


class PGD:
    """K steps of projected gradient ascent on the loss.

    `attack(x, y)` returns x_adv after exactly `steps` forward passes and `steps` input gradients;
    `attack.run(x, y)` also says how it ended, for one forward pass more. The model's modes,
    BatchNorm statistics, `.grad` and `requires_grad` are afterwards as they were, also when the
    model raises; with keyed starts so is torch's generator. It never moves the model or the data.

    Args:
        model: anything that maps x to logits (B, C). A DistributedDataParallel wrapper is attacked
            through `.module`. May be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x; float, per sample (B,), or broadcastable.
        alpha: step size, in units of x; like eps.
        steps: number of steps K.
        loss: what is maximised: "ce", "margin" (the loss GAIRAT and FAT call CW), "dlr", "kl" (from
            the model's natural prediction: the TRADES attack), "slm", or a callable (logits, y) ->
            (B,), differentiated by autograd.
        start: "keyed" (uniform in the ball, the same for a sample whatever batch it comes in),
            "uniform" and "normal_small" (x + 0.001 N(0, 1)) from torch's generator as the official
            codes draw them, "none", or a callable x -> first iterate, taken as it is.
        restarts: independent starts, run as one batch; the best end point of each sample is kept.
        targeted: y is the class to reach.
        lo, hi: the box inputs lie in; None for no bound; float, or tensor like eps.
        keep: share of the coordinates, those with the largest gradient, that an L1 step moves;
            float in (0, 1] or per sample.
        bn: "eval", or "train" for batch statistics in BatchNorm layers.
        update_stats: with bn="train", let the attack's batches into the running statistics.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact: drop released rows from the batch (friendly attacks): "auto", True or False.
        output: how to find the logits in what the model returns: a callable, key, attribute name or
            index.
        grad_mode: "fused", or "autograd" for the plain expressions of the official codes.
        scale: "unit" keeps each row's logit gradient from vanishing, so that confident samples are
            attacked too; "exact" is the true gradient. See `ops.attack_loss`. bn="train" needs and
            uses "exact", because there rows depend on each other.
        validate: check values (NaN, labels, box), "auto" (on the CPU), True or False. Shapes and
            dtypes are always checked.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits; the message names the argument, the rule and what was seen.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        norm: str | float = "Linf",
        eps: Parameter = 8 / 255,
        alpha: Parameter = 2 / 255,
        steps: int = 10,
        loss: str | LossFunction = "ce",
        start: Start = "keyed",
        restarts: int = 1,
        targeted: bool = False,
        lo: Parameter | None = 0.0,
        hi: Parameter | None = 1.0,
        keep: Parameter = 0.2,
        bn: str = "eval",
        update_stats: bool = False,
        seed: int | None = None,
        compact: bool | str = "auto",
        output: Output = None,
        grad_mode: str = "fused",
        scale: str | None = None,
        validate: bool | str = "auto",
    ):
        _checks.size("eps", eps)
        _checks.size("alpha", alpha)
        _checks.count("steps", steps, 0)
        if not callable(start):
            _checks.choice("start", start, STARTS)
        _checks.choice("bn", bn, ("eval", "train"))
        _checks.choice("compact", compact, ("auto", True, False))
        _checks.choice("validate", validate, ("auto", True, False))
        _checks.choice("scale", scale, (None, "unit", "exact"))
        if loss == "kl" and start == "none":
            raise ValueError(
                'loss="kl" needs a start other than "none": its gradient is exactly zero at x'
            )
        if loss == "kl" and targeted:
            raise ValueError('loss="kl" has no target: it leads away from the natural prediction')
        if bn == "train" and scale == "unit":
            raise ValueError('scale="unit" needs bn="eval": with batch statistics rows mix')
        self.model = model
        self.restarts = _checks.count("restarts", restarts, 1)
        self.seed = seed
        self.draw = 0
        self.settings = Settings(
            norm=_checks.canonical_norm(norm),
            eps=eps,
            alpha=alpha,
            steps=steps,
            loss=Loss(loss, targeted, grad_mode, scale or ("exact" if bn == "train" else "unit")),
            start=start,
            lo=lo,
            hi=hi,
            keep=keep,
            bn=bn,
            update_stats=update_stats,
            compact=compact,
            output=output,
            validate=validate,
            patience=steps,
        )

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Adversarial examples for x (B, ...) with labels y (B,)."""
        if self.restarts > 1:
            return self.run(x, y, ids).x_adv
        return self.perturb(x, y, ids).x_adv

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Callable[..., Any] | None = None,
    ) -> Perturbed:
        """The steps alone, from one start: x_adv and what was learned on the way (kappa)."""
        target, noise = self._begin(x, y, ids, draw, model)
        return search(target, x, y, self.settings, noise)

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Callable[..., Any] | None = None,
    ) -> AttackResult:
        """The attack and how it ended.

        Args:
            x: (B, ...) inputs in the box.
            y: (B,) int64 labels; the targets when `targeted`.
            ids: (B,) int64 sample ids for the keyed noise; a hash of each row of x by default.
            draw: which draw of the keyed noise; by default the attack's own counter, which every
                call advances.
            model: attack this model instead of the one given at construction.
        """
        target, noise = self._begin(x, y, ids, draw, model)
        s, n = self.settings, self.restarts
        if n == 1:
            return judge(target, x, y, search(target, x, y, s, noise), s)
        noise = noise.restarted(n)
        try:
            if s.bn == "eval":  # batch statistics belong to the batch as it is
                return _best(_attack_rows(target, x, y, s, noise, slice(0, n * len(x))), n)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        b = len(x)
        parts = [_attack_rows(target, x, y, s, noise, slice(r * b, (r + 1) * b)) for r in range(n)]
        return _best(_concatenate(parts), n)

    def state_dict(self) -> dict[str, int]:
        """What the keyed noise of later calls depends on."""
        return {"draw": self.draw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.draw = int(state["draw"])

    def _begin(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None,
        draw: int | None,
        model: Callable[..., Any] | None,
    ) -> tuple[Callable[..., Any], Noise]:
        model = self.model if model is None else model
        if model is None:
            raise ValueError("attack: no model; give one at construction or as model=")
        _checks.batch(x, y, ids)
        _checks.parameters(x, self.settings.parameters)
        if draw is None:
            draw = self.draw
            self.draw += 1
        if ids is None:
            ids = ops.row_hash(x) if self._uses_keyed_noise else torch.zeros_like(y)
        seed = torch.initial_seed() if self.seed is None else self.seed
        return model, Noise(ids, seed, draw)

    @property
    def _uses_keyed_noise(self) -> bool:
        return self.settings.start == "keyed" or self.settings.omega > 0


class FriendlyPGD(PGD):
    """PGD that stops for each sample on its own: once a sample has been fooled at `tau` iterates,
    it is released at the next fooled one and stays as it is; the batch keeps its order.

    Takes what `PGD` takes, and

    Args:
        tau: fooled iterates that a sample is still stepped on from. 0 returns the first fooled
            iterate (the start itself, if that is one); tau >= steps is PGD. The count never goes
            back, also when a sample is classified correctly again.
        omega: standard deviation of the normal noise that is added after each step and projected
            again (0.001 in the official code of FAT).

    Source: Zhang et al., ICML 2020, algorithm 1. The official code reorders the batch; this does
    not.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        tau: int = 0,
        omega: float = 0.0,
        **settings: Any,
    ):
        super().__init__(model, **settings)
        _checks.size("omega", omega)
        self.settings = replace(self.settings, omega=omega)
        self.tau = tau

    @property
    def tau(self) -> int:
        return self.settings.patience

    @tau.setter
    def tau(self, value: int) -> None:
        self.settings = replace(self.settings, patience=_checks.count("tau", value, 0))


def pgd(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    *,
    ids: Tensor | None = None,
    draw: int = 0,
    **settings: Any,
) -> Tensor:
    """Adversarial examples by `PGD(model, **settings)`, as a function. Without state of its own it
    starts from the same keyed noise at every call; pass `draw` for another."""
    attack = PGD(model, **settings)
    attack.draw = draw
    return attack(x, y, ids)


def _attack_rows(
    model: Callable[..., Any], x: Tensor, y: Tensor, s: Settings, noise: Noise, rows: slice
) -> AttackResult:
    """The attack on a part of the batch repeated for its restarts."""
    b = len(x)
    kept = torch.arange(rows.start, rows.stop, device=x.device) % max(b, 1)
    x_part, y_part = x[kept], y[kept]
    s = s.select(kept, x)
    found = search(model, x_part, y_part, s, replace(noise, ids=noise.ids[rows]))
    return judge(model, x_part, y_part, found, s)


def _concatenate(parts: list[AttackResult]) -> AttackResult:
    names = [f.name for f in fields(AttackResult)]
    return AttackResult(**{k: torch.cat([getattr(p, k) for p in parts]) for k in names})


def _best(result: AttackResult, n: int) -> AttackResult:
    """Of n restarts, for each sample: one that fooled the model, and of those the highest loss."""
    loss = result.loss.nan_to_num(nan=-torch.inf).view(n, -1)
    fooled = ~result.correct.view(n, -1)
    candidates = torch.where(fooled | ~fooled.any(0), loss, -torch.inf)
    b = loss.shape[1]
    chosen = candidates.argmax(0) * b + torch.arange(b, device=loss.device)
    best = AttackResult(**{f.name: getattr(result, f.name)[chosen] for f in fields(AttackResult)})
    best.queries = result.queries.view(n, -1).sum(0)
    return best
