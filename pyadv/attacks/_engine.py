"""The one loop behind every gradient attack:

    start -> repeat (forward, loss and its logit gradient, track, input gradient, step)

Variants are data: the loss, the start, the step of the norm, and the patience after which a fooled
sample is released (all the steps for PGD, fewer for friendly PGD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks import _checks
from pyadv.attacks._losses import Loss
from pyadv.attacks._model import Output, borrowed, gradients_on, owned, pick_logits, unwrap
from pyadv.attacks._result import AttackResult, Perturbed
from pyadv.attacks._start import Noise, start
from pyadv.reference._common import keep_inactive

STEP = {"Linf": ops.linf_step, "L2": ops.l2_step, "L1": ops.l1_step}
PROJECT = {"Linf": ops.linf_project, "L2": ops.l2_project, "L1": ops.l1_project}

Parameter = float | Tensor


@dataclass(frozen=True)
class Settings:
    """What a gradient attack is; the public classes fill it in and document it."""

    norm: str
    eps: Parameter
    alpha: Parameter
    steps: int
    loss: Loss
    start: str
    lo: Parameter | None
    hi: Parameter | None
    bn: str
    update_stats: bool
    compact: bool | str
    output: Output
    validate: bool | str
    patience: int  # fooled iterates a sample may have before it is released
    keep: Parameter = 0.2  # share of the coordinates an L1 step moves
    omega: float = 0.0  # standard deviation of the noise added after each step

    @property
    def parameters(self) -> dict[str, Parameter | None]:
        """What may hold one value per sample."""
        return {k: getattr(self, k) for k in ("eps", "alpha", "lo", "hi", "keep")}

    def select(self, kept: Tensor, x: Tensor) -> Settings:
        """For the rows `kept` of x: per-sample parameters follow their rows."""
        return replace(self, **{k: _select(v, kept, x) for k, v in self.parameters.items()})


@dataclass
class _Rows:
    """The samples still attacked: all that the loop carries along, one row each."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    kappa: Tensor
    active: Tensor
    patience: Tensor
    reference_logits: Tensor | None
    noise: Noise
    settings: Settings  # its per-sample parameters have these rows
    index: Tensor | None = None  # their places in the batch; None: all of it

    def select(self, kept: Tensor) -> _Rows:
        return _Rows(
            x=self.x[kept],
            x_adv=self.x_adv[kept],
            y=self.y[kept],
            kappa=self.kappa[kept],
            active=self.active[kept],
            patience=self.patience[kept],
            reference_logits=_rows_of(self.reference_logits, kept),
            noise=replace(self.noise, ids=self.noise.ids[kept]),
            settings=self.settings.select(kept, self.x),
            index=kept if self.index is None else self.index[kept],
        )


def search(
    model: Callable[..., Any], x: Tensor, y: Tensor, settings: Settings, noise: Noise
) -> Perturbed:
    """The steps of the attack, `settings.steps` forward passes and input gradients."""
    target = unwrap(model)
    with gradients_on(), borrowed(target, settings.bn, settings.update_stats):
        return _loop(target, owned(x), owned(y), settings, noise)


def judge(
    model: Callable[..., Any], x: Tensor, y: Tensor, found: Perturbed, settings: Settings
) -> AttackResult:
    """The network's word on `found.x_adv`: one forward pass."""
    target = unwrap(model)
    s = settings
    with torch.inference_mode(False), torch.no_grad(), borrowed(target, s.bn, s.update_stats):
        logits = pick_logits(target(found.x_adv), s.output)
        needs_reference = s.loss.needs_reference_logits
        reference = pick_logits(target(owned(x)), s.output) if needs_reference else None
        loss, _, correct = s.loss.at(logits, owned(y), reference)
    return AttackResult(
        found.x_adv, logits, correct, loss, found.kappa, found.steps, found.queries + 1
    )


def _loop(
    model: Callable[..., Any], x: Tensor, y: Tensor, settings: Settings, noise: Noise
) -> Perturbed:
    s = settings
    validate = s.validate is True or (s.validate == "auto" and x.device.type == "cpu")
    if validate:
        _checks.values(x, {"eps": s.eps, "alpha": s.alpha}, s.lo, s.hi)
    rows = _Rows(
        x=x,
        x_adv=start(s.start, s.norm, x, s.eps, s.lo, s.hi, noise),
        y=y,
        kappa=torch.zeros_like(y),
        active=torch.ones_like(y, dtype=torch.bool),
        patience=torch.full_like(y, s.patience),
        reference_logits=_reference_logits(model, x, s),
        noise=noise,
        settings=s,
    )
    done = Perturbed(rows.x_adv, rows.kappa, torch.zeros_like(y), torch.zeros_like(y))
    releases = s.patience < s.steps
    compact = releases and _may_compact(model, x, s)
    for k in range(s.steps):
        leaf = rows.x_adv.detach().requires_grad_()
        logits = pick_logits(model(leaf), s.output)
        if k == 0:
            _check_first(logits, y, s.loss, validate)
        _, grad_logits, still = s.loss.at(logits, rows.y, rows.reference_logits)
        _add(done.queries, rows, rows.active)
        ops.track(still, rows.kappa, rows.active, rows.patience)
        _add(done.steps, rows, rows.active)
        if compact and not rows.active.any():
            break
        (grad,) = torch.autograd.grad(logits, leaf, grad_logits)
        _step(rows, grad, k, rows.active if releases else None)
        if compact and _worth_compacting(rows.active):
            _write_back(done, rows)
            rows = rows.select(rows.active.nonzero()[:, 0])
    _write_back(done, rows)
    return done


def _step(rows: _Rows, grad: Tensor, k: int, active: Tensor | None) -> None:
    """One step in place. The graph that saved x_adv is gone by now."""
    s = rows.settings
    more = {"keep": s.keep} if s.norm == "L1" else {}
    STEP[s.norm](
        rows.x_adv, grad, rows.x, s.alpha, s.eps, s.lo, s.hi, active, out=rows.x_adv, **more
    )
    if s.omega:
        noisy = rows.x_adv + s.omega * rows.noise.normal(rows.x, step=k + 1)
        noisy = PROJECT[s.norm](noisy, rows.x, s.eps, s.lo, s.hi)
        rows.x_adv.copy_(keep_inactive(noisy, rows.x_adv, active))


def _reference_logits(model: Callable[..., Any], x: Tensor, s: Settings) -> Tensor | None:
    """The natural logits of a KL attack: constant during the attack, so computed once."""
    if not s.loss.needs_reference_logits:
        return None
    with torch.no_grad():
        return pick_logits(model(x), s.output)


def _check_first(logits: Tensor, y: Tensor, loss: Loss, validate: bool) -> None:
    if not logits.requires_grad:
        raise ValueError(
            "attack: the model's logits carry no gradient with respect to its input; it must not "
            "detach its input or run under no_grad"
        )
    if validate:
        _checks.logits(logits, y)


def _may_compact(model: Callable[..., Any], x: Tensor, s: Settings) -> bool:
    if s.bn == "train":
        if s.compact is True:
            raise ValueError('compact=True needs bn="eval": batch statistics need the whole batch')
        return False
    # Counting the active rows waits for a GPU, and a compiled model compiles again for new shapes.
    return s.compact is True or (
        s.compact == "auto" and x.device.type == "cpu" and not hasattr(model, "_orig_mod")
    )


def _worth_compacting(active: Tensor) -> bool:
    """A row less saves a row of forward and backward and costs a copy of the rows that stay, which
    for any network is little; not for one row of hundreds though."""
    remaining, now = int(active.sum()), active.numel()
    return 0 < remaining <= 0.95 * now


def _add(totals: Tensor, rows: _Rows, active: Tensor) -> None:
    if rows.index is None:
        totals += active
    else:
        totals[rows.index] += active


def _write_back(done: Perturbed, rows: _Rows) -> None:
    if rows.index is not None:
        done.x_adv[rows.index] = rows.x_adv
        done.kappa[rows.index] = rows.kappa


def _rows_of(t: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if t is None else t[kept]


def _select(value: Any, kept: Tensor, x: Tensor) -> Any:
    """Per-sample parameters follow their rows; others (per channel, scalar) stay."""
    per_sample = (
        isinstance(value, Tensor)
        and value.dim() in (1, x.dim())
        and value.shape[0] == x.shape[0]
        and value.numel() > 1
    )
    return value[kept] if per_sample else value
