"""Projected gradient descent: PGD (Madry et al., ICLR 2018) and its early-stopped form, friendly
PGD (Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML
2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyadv.engine import checks
from pyadv.engine.attack import Attack, functional, show
from pyadv.engine.losses import Loss, LossFunction
from pyadv.engine.losses import check as check_loss
from pyadv.engine.rules import PlainRule
from pyadv.engine.settable import Setting
from pyadv.engine.starts import Start
from pyadv.engine.task import FloatOrTensor, GradientSettings, radius, step_size
from pyadv.menus import (
    BESTS,
    SCALES,
    STARTS,
    Auto,
    BatchNormMode,
    Best,
    GradMode,
    LossName,
    Norm,
    Scale,
    Speed,
)
from pyadv.passes.borrow import Output

_PLUS_SHARE = 0.01 / 0.031  # of eps, the step of PGD+


class PGD(Attack):
    """K steps of projected gradient ascent on the loss.

    `attack(x, y)` returns x_adv after exactly `steps` forward passes and `steps` input gradients
    (one forward pass more with `best` other than "last"); `attack.run(x, y)` also says how it
    ended, for one forward pass more. The model's modes, BatchNorm statistics, `.grad` and
    `requires_grad` are afterwards as they were, also when the model raises; with keyed starts so is
    torch's generator. It never moves the model or the data. In L1 it is a weak attack: on an
    adversarially trained network it broke 3 % of the images where `APGD` broke 23 %, so evaluate
    with `APGD`.

    Args:
        model: anything that maps x to logits (B, C). A DistributedDataParallel wrapper is attacked
            through `.module`. May be None when every call names a model.
        norm: "Linf", "L2" or "L1" (or inf, 2, 1).
        eps: radius of the ball around x, in units of x; float, per sample (B,), or broadcastable.
            The default, 8/255, is for Linf; in another norm eps must be given.
        alpha: step size, in units of x; like eps. By default it follows eps, norm and steps:
            eps / 4 for 10 steps in Linf; see `pyadv.engine.step_size`. A warning says when an alpha
            that is given is so small that all steps together reach less than eps / 2.
        steps: number of steps K.
        loss: what is maximised: "ce", "margin" (the loss GAIRAT and FAT call CW), "dlr", "kl" (from
            the model's natural prediction: the TRADES attack), "slm", or a callable (logits, y) ->
            (B,), differentiated by autograd.
        start: "keyed" (uniform in the ball, the same for a sample whatever batch it comes in),
            "uniform" and "normal_small" (x + 0.001 N(0, 1)) from torch's generator as the official
            codes draw them, "none", or a callable x -> first iterate, taken as it is.
        restarts: independent starts, run as one batch; the best result of each sample is kept: one
            that fools the model, of those the highest loss.
        best: which iterate is the result: "last"; "loss", that of highest loss, the start included;
            or "fooled", the first one that fools the model, with which the sample leaves the attack
            (highest loss if there is none).
        eot: gradients averaged at each iterate, for models that are random (expectation over
            transformations, Athalye et al., ICML 2018).
        targeted: y is the class to reach.
        lo, hi: the box inputs lie in; None for no bound; float, or tensor like eps.
        keep: share of the coordinates, those with the largest gradient, that an L1 step moves;
            float in (0, 1] or per sample.
        bn: "eval", or "train" for batch statistics in BatchNorm layers.
        update_stats: with bn="train", let the attack's batches into the running statistics.
        seed: of the keyed noise; torch.initial_seed() by default.
        compact: drop released rows from the batch (friendly attacks, best="fooled"): "auto", True
            or False.
        output: how to find the logits in what the model returns: a callable, key, attribute name or
            index.
        grad_mode: "fused", or "autograd" for the plain expressions of the official codes.
        scale: "unit" keeps each row's logit gradient from vanishing, so that confident samples are
            attacked too; "exact" is the true gradient. See `ops.attack_loss`. bn="train" needs and
            uses "exact", because there rows depend on each other; so does eot > 1, because there
            gradients are averaged.
        validate: check values (NaN, labels, box), "auto" (on the CPU), True or False. Shapes and
            dtypes are always checked.
        speed: "exact"; "fast", which searches on a view of the network that computes the same in
            less time (`fast_view`); or "bfloat16", the same with 16-bit convolutions and linear
            layers. The verdict is always the model's own, and where the search depends on verdicts
            it is repeated on the model for samples on which the two differ.
        graph: record the steps as a CUDA graph and replay it: "auto" (on CUDA, where that can be
            done), True (an error where it cannot) or False; `attack.graphs` says what became of it.

    Raises:
        ValueError, TypeError: at construction for settings, at the call for x, y and the model's
            logits; the message names the argument, the rule and what was seen.
    """

    settings: GradientSettings

    alpha = Setting("settings.alpha")
    loss = Setting("settings.loss.loss")
    best = Setting("settings.best")
    eot = Setting("settings.eot")
    keep = Setting("settings.keep")
    grad_mode = Setting("settings.loss.grad_mode")
    scale = Setting("settings.loss.scale")

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        alpha: FloatOrTensor | None = None,
        steps: int = 10,
        loss: LossName | LossFunction = "ce",
        start: Start = "keyed",
        restarts: int = 1,
        best: Best = "last",
        eot: int = 1,
        targeted: bool = False,
        lo: FloatOrTensor | None = 0.0,
        hi: FloatOrTensor | None = 1.0,
        keep: FloatOrTensor = 0.2,
        bn: BatchNormMode = "eval",
        update_stats: bool = False,
        seed: int | None = None,
        compact: Auto = "auto",
        output: Output = None,
        grad_mode: GradMode = "fused",
        scale: Scale | None = None,
        validate: Auto = "auto",
        speed: Speed = "exact",
        graph: Auto = "auto",
    ):
        norm = checks.canonical_norm(norm)
        eps = radius(eps, norm)
        if alpha is None:
            checks.size("eps", eps)
            alpha = step_size(eps, norm, checks.count("steps", steps, 0))
        if not callable(start):
            checks.choice("start", start, STARTS)
        checks.choice("best", best, BESTS)
        checks.choice("scale", scale, (None, *SCALES))
        if loss == "kl" and start == "none":
            raise ValueError(
                'loss="kl" needs a start other than "none": its gradient is exactly zero at x'
            )
        if loss == "kl" and targeted:
            raise ValueError('loss="kl" has no target: it leads away from the natural prediction')
        if bn == "train" and scale == "unit":
            raise ValueError('scale="unit" needs bn="eval": with batch statistics rows mix')
        if eot != 1 and scale == "unit":
            raise ValueError('scale="unit" needs eot=1: a mean needs gradients of one scale')
        scale = scale or ("exact" if bn == "train" or eot != 1 else "unit")
        settings = GradientSettings(
            norm=norm,
            eps=eps,
            alpha=alpha,
            steps=steps,
            loss=Loss(check_loss(loss), targeted, grad_mode, scale),
            start=start,
            lo=lo,
            hi=hi,
            compact=compact,
            output=output,
            validate=validate,
            speed=speed,
            rule=PlainRule(),
            patience=0 if best == "fooled" else steps,
            best=best,
            eot=eot,
            bn=bn,
            update_stats=update_stats,
            keep=keep,
        )
        super().__init__(model, settings, restarts, seed, graph)

    def _search_words(self) -> list[str]:
        s = self.settings
        words = [f"{s.steps} steps of {show(s.alpha)}", f"loss {show(s.loss.loss)}"]
        return words if s.best == "last" else [*words, f"best={s.best}"]


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

    tau = Setting("settings.patience")
    omega = Setting("settings.rule.omega")

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        tau: int = 0,
        omega: float = 0.0,
        **settings: Any,
    ):
        super().__init__(model, **settings)
        if self.settings.best != "last":
            raise ValueError(
                'FriendlyPGD stops each sample at an iterate of its own: best must be "last", got '
                f"{self.settings.best!r}"
            )
        checks.size("omega", omega, tensor=False)
        patience = checks.count("tau", tau, 0)
        self.settings = replace(self.settings, rule=PlainRule(omega), patience=patience)


class PGDPlus(PGD):
    """PGD+, the evaluation of Gowal et al. that GAIRAT reports: 5 restarts of 40 steps. A sample
    counts as robust only if every iterate of every restart is classified correctly (here the
    starts too), so it leaves at the first one that is not.

    Takes what `PGD` takes, with the defaults of GAIRAT's evaluation: eps 0.031 in Linf and 40 steps
    of 0.01. Without alpha a step has this share of eps, 10/31, at any radius.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        alpha: FloatOrTensor | None = None,
        steps: int = 40,
        restarts: int = 5,
        **settings: Any,
    ):
        eps = radius(eps, checks.canonical_norm(norm), 0.031)
        if alpha is None:
            checks.size("eps", eps)
            alpha = eps * _PLUS_SHARE
        settings = {
            "best": "fooled",
            "norm": norm,
            "steps": steps,
            "restarts": restarts,
            **settings,
        }
        super().__init__(model, eps=eps, alpha=alpha, **settings)


pgd = functional("pgd", PGD)
