"""The one loop behind every gradient attack:

    start -> repeat (forward, loss and its logit gradient, track, input gradient, rule, step)

Variants are data: the loss, the start, the step rule (`_rules`), which iterate is the result, and
the patience after which a fooled sample is released (all the steps for PGD, fewer for friendly
PGD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.engine.compact import Remaining, first_active, may_compact, worth_compacting
from pyadv.engine.graphs import Call
from pyadv.engine.norms import distance
from pyadv.engine.results import AttackResult, Perturbed
from pyadv.engine.starts import Noise
from pyadv.engine.state import Best, Parameter, Rows, Settings
from pyadv.ops.geometry import unchecked_track
from pyadv.passes.borrow import borrowed, gradients_on, owned, pick_logits, unwrap
from pyadv.reference.losses import has_answer
from pyadv.tensors import per_row

__all__ = [
    "Parameter",
    "Settings",
    "check_first",
    "input_gradient",
    "judge",
    "predict",
    "search",
]


def search(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    settings: Settings,
    noise: Noise,
    target: Tensor | None = None,
    group: Tensor | None = None,
) -> Perturbed:
    """The steps of the attack, `settings.steps` forward passes and input gradients, and a last
    forward pass where the result is not simply the last iterate.

    Args:
        target: (B,) classes, for a loss that leads to one.
        group: (B,) numbers in 0 .. B - 1. Rows with the same number are attempts at one sample:
            with best="fooled" all of them are released when one has fooled the model.
    """
    model = unwrap(model)
    x, y = owned(x), owned(y)
    s = settings
    with gradients_on(), borrowed(model, s.bn, s.update_stats):
        if s.checks_values(x):
            checks.values(x, {"eps": s.eps, "alpha": s.alpha}, s.lo, s.hi)
        first = s.start_from(s.start, s.norm, x, s.eps, s.lo, s.hi, noise)
        call = Call(x, first, y, s, noise, target, group)
        return s.graphs.run(_loop, model, call, _releases(s) and may_compact(model, x, s))


def predict(model: Callable[..., Any], x: Tensor, settings: Settings) -> Tensor:
    """The model's logits, by one forward pass under the rules of the attack."""
    s, model = settings, unwrap(model)
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, s.bn, s.update_stats):
        return pick_logits(model(x.clone()), s.output)  # its own: it may write into its input


def judge(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    found: Perturbed,
    settings: Settings,
    target: Tensor | None = None,
) -> AttackResult:
    """The network's word on `found.x_adv`: one forward pass."""
    s = settings
    logits = predict(model, found.x_adv, s)
    reference = predict(model, x, s) if s.loss.needs_reference_logits else None
    with torch.inference_mode(False), torch.no_grad():
        loss, _, correct = s.loss.at(logits, owned(y), reference, target)
    taken = {f.name: getattr(found, f.name) for f in fields(Perturbed)}
    taken["queries"] = found.queries + 1
    non_finite = ~has_answer(logits)
    return AttackResult(logits=logits, correct=correct, loss=loss, non_finite=non_finite, **taken)


def _loop(model: Callable[..., Any], call: Call) -> Perturbed:
    """The steps, from `call.first`, which they move. Without compaction they ask nothing of a GPU,
    and can be recorded."""
    s, x, y = call.settings, call.x, call.y
    grouped = call.group is not None and s.best == "fooled"
    rows = Rows(
        x=x,
        x_adv=call.first,
        y=y,
        kappa=torch.zeros_like(y),
        active=torch.ones_like(y, dtype=torch.bool),
        patience=torch.full_like(y, s.patience),
        reference_logits=_reference_logits(model, x, s),
        target=call.target,
        group=call.group if grouped else None,
        noise=call.noise,
        settings=s,
        rule=s.rule,
        looks=torch.zeros_like(y),
        steps=torch.zeros_like(y),
    )
    rows.rule = s.rule.begin(rows)
    done = None
    broken = torch.zeros_like(y)  # groups
    nearest = s.best == "nearest"
    releases = _releases(s)
    remaining = Remaining(x) if releases and may_compact(model, x, s) else None
    looks, passes = s.steps + (s.best != "last"), 0  # of all; backward passes of a step
    for k in range(looks):
        steps_on = k < s.steps
        differentiate = steps_on and s.by_gradient
        loss, logits, still, gradient = _look(model, rows, differentiate)
        if k == 0:
            check_first(logits, y, s.checks_values(x), differentiate)
        rows.still = still
        if releases:
            rows.looks += rows.active
        if nearest:
            _remember(rows, _nearness(rows), None)
            rows.active &= rows.best.loss < 0  # nothing is nearer than x itself
        if not steps_on:
            if not nearest:
                _remember(rows, loss, None)
            rows.active &= still  # the others have fooled the model just now
            break
        if releases:
            unchecked_track(still, rows.kappa, rows.active, rows.patience)
            if grouped:
                broken.scatter_reduce_(0, rows.group, (~rows.active).long(), "amax")
                rows.active &= broken[rows.group] == 0
            rows.steps += rows.active
        else:
            rows.kappa += still
        size = None if remaining is None else remaining(rows.active)
        if size == 0:
            break
        grad = None
        if differentiate:
            grad, passes = gradient()
        if s.best != "last" and not nearest:
            _remember(rows, loss, grad)
        grad = rows.rule.observe(rows, k, loss, grad)
        rows.rule.step(rows, grad, k, rows.active if releases else None)
        if size is not None and worth_compacting(size, len(rows.active), s.steps - k):
            done = _written_back(done, rows, passes)
            rows = rows.select(first_active(rows.active, size))
    if not releases:
        rows.looks += looks
        rows.steps += s.steps
    return _written_back(done, rows, passes)


def _releases(s: Settings) -> bool:
    """Whether samples can leave the attack before its end."""
    return s.patience < s.steps or s.best == "nearest"


def _look(
    model: Callable[..., Any], rows: Rows, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor, Callable[[], tuple[Tensor, int]]]:
    """The loss of the current iterates, the logits, which rows are still classified as y, and, when
    asked for, the input gradient (or the direction of the settings) with the number of backward
    passes it cost. The loss and the gradient are means over `eot` looks; the rest is of the last.
    """
    s = rows.settings
    losses, grads = [], []
    for remaining in reversed(range(s.eot)):
        # A model that writes into its input raises when that is a leaf, but not without gradients.
        if differentiate:
            leaf = rows.x_adv.detach().requires_grad_()
            logits = pick_logits(model(leaf), s.output)
        else:
            leaf = rows.x_adv.clone()
            with torch.no_grad():
                logits = pick_logits(model(leaf), s.output)
        loss, grad_logits, still = s.loss.at(logits, rows.y, rows.reference_logits, rows.target)
        losses.append(loss)
        if remaining and differentiate:
            grads.append(input_gradient(logits, leaf, grad_logits))

    def gradient() -> tuple[Tensor, int]:
        if s.direction is not None:
            return s.direction(rows, logits, leaf)
        return _mean([*grads, input_gradient(logits, leaf, grad_logits)]), s.eot

    return _mean(losses), logits, still, gradient


_NO_GRADIENT = (
    "attack: the model's logits carry no gradient with respect to its input; it must not detach "
    "its input or run under no_grad"
)


def input_gradient(
    logits: Tensor, leaf: Tensor, grad_logits: Tensor, retain_graph: bool = False
) -> Tensor:
    (grad,) = torch.autograd.grad(
        logits, leaf, grad_logits, allow_unused=True, retain_graph=retain_graph
    )
    if grad is None:
        raise ValueError(_NO_GRADIENT)
    return grad


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


def _remember(rows: Rows, loss: Tensor, grad: Tensor | None) -> None:
    if rows.best is None:
        rows.best = Best.first(rows.x_adv, loss, grad)
    else:
        rows.best.update(rows.x_adv, loss, grad)


def _nearness(rows: Rows) -> Tensor:
    """Minus the distance from x, of the iterates that fool the model now."""
    away = distance(rows.x_adv, rows.x, rows.settings.norm)
    return torch.where(rows.active & ~rows.still, -away, -torch.inf)


def _written_back(done: Perturbed | None, rows: Rows, passes: int) -> Perturbed:
    """The result so far, with that of the rows; `passes` is of one gradient."""
    x_adv = rows.x_adv
    if rows.settings.best in ("loss", "nearest"):
        x_adv = rows.best.x_adv
    elif rows.settings.best == "fooled" and rows.best is not None:
        x_adv = torch.where(per_row(rows.active, x_adv), rows.best.x_adv, x_adv)
    queries, gradients = rows.settings.eot * rows.looks, passes * rows.steps
    found = Perturbed(x_adv, rows.kappa, rows.steps, queries, gradients)
    if done is None:
        return found
    for f in fields(Perturbed):
        getattr(done, f.name)[rows.index] = getattr(found, f.name)
    return done


def _reference_logits(model: Callable[..., Any], x: Tensor, s: Settings) -> Tensor | None:
    """The natural logits of a KL attack: constant during the attack, so computed once."""
    if not s.loss.needs_reference_logits:
        return None
    with torch.no_grad():
        return pick_logits(model(x.clone()), s.output)


def check_first(logits: Tensor, y: Tensor, validate: bool, differentiate: bool) -> None:
    if differentiate and not logits.requires_grad:
        raise ValueError(_NO_GRADIENT)
    if validate:
        checks.logits(logits, y)
