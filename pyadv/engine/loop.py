"""The loop of Square and of the attacks that step along gradients:

    start -> repeat (forward, loss and its logit gradient, track, input gradient, rule, step)

Attacks differ in data: the loss, the start, the step rule (`rules`), the iterate that is the
result, and the patience after which a fooled sample is released (all steps for PGD, fewer for
friendly PGD). `fab.py` explains why FAB has a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.engine.compact import Remaining, first_active, may_compact, worth_compacting
from pyadv.engine.graphs import Graphs
from pyadv.engine.norms import distance
from pyadv.engine.results import AttackResult, Perturbed
from pyadv.engine.rounding import leaves_by_rounding, round_inward_
from pyadv.engine.state import Best, State
from pyadv.engine.task import Settings, Task
from pyadv.ops.geometry import unchecked_track
from pyadv.passes.borrow import borrowed, gradients_on, owned, pick_logits, unwrap
from pyadv.reference.losses import has_answer
from pyadv.tensors import per_row

_STARTS_INSIDE = ("keyed", "uniform", "generator", "official")  # which the engine draws


def search(task: Task, graphs: Graphs) -> Perturbed:
    """Run the steps of an attack and return what they found.

    They take `settings.steps` forward passes and input gradients, and one more forward pass if the
    result is not always the last iterate. `graphs` holds the recordings.
    """
    model, s = unwrap(task.model), task.settings
    x, y = owned(task.x), owned(task.y)
    with gradients_on(), borrowed(model, s.bn, s.update_stats):
        check_values(x, s)
        first = s.start_from(s.start, s.norm, x, s.eps, s.lo, s.hi, task.noise)
        target = None if task.target is None else owned(task.target)
        task = replace(task, model=model, x=x, y=y, target=target, first=first)
        compacts = s.releases and may_compact(model, x, s, graphs.mode)
        return graphs.run(partial(_loop, compacts=compacts), task, compacts)


def predict(model: Callable[..., Any], x: Tensor, settings: Settings) -> Tensor:
    """Return the model's logits by one forward pass, with the modes that the attack sets."""
    s, model = settings, unwrap(model)
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, s.bn, s.update_stats):
        # The model may write into its input, so it gets a copy.
        return pick_logits(model(x.clone()), s.output, len(x))


def judge(task: Task, found: Perturbed) -> AttackResult:
    """Return the verdict of `task.model` on `found.x_adv`, by one forward pass."""
    s, model = task.settings, task.model
    logits = predict(model, found.x_adv, s)
    if not s.steps and s.checks_values(task.x):  # no step has looked at the labels
        checks.label_range(task.y, logits.shape[1])
    reference = predict(model, task.x, s) if s.loss.needs_reference_logits else None
    with torch.inference_mode(False), torch.no_grad():
        target = None if task.target is None else owned(task.target)
        loss, _, correct = s.loss.at(logits, owned(task.y), reference, target)
    taken = {f.name: getattr(found, f.name) for f in fields(Perturbed)}
    taken["queries"] = found.queries + 1
    non_finite = ~has_answer(logits)
    return AttackResult(logits=logits, correct=correct, loss=loss, non_finite=non_finite, **taken)


def check_values(x: Tensor, s: Settings) -> None:
    """Check the values of x, and of radii and step sizes, if the settings ask for it."""
    if s.checks_values(x):
        checks.values(x, {name: getattr(s, name) for name in s.sizes}, s.lo, s.hi)


def check_first(logits: Tensor, y: Tensor, validate: bool, differentiate: bool) -> None:
    """Raise if the first logits of a search have no gradient or, with `validate`, if their values
    or the labels are invalid."""
    if differentiate and not logits.requires_grad:
        raise ValueError(_NO_GRADIENT)
    if validate:
        checks.logits(logits, y)


def _loop(task: Task, compacts: bool) -> Perturbed:
    """Run the steps from `task.first`. Without compaction they never wait for a GPU, so that they
    can be recorded."""
    s, model, y, rule = task.settings, task.model, task.y, task.settings.rule
    grouped = task.group is not None and s.best == "fooled"
    nearest = s.best == "nearest"
    state = State(
        x=task.x,
        x_adv=task.first,
        y=y,
        kappa=torch.zeros_like(y),
        active=torch.ones_like(y, dtype=torch.bool),
        patience=torch.full_like(y, s.patience),
        reference_logits=_reference_logits(task),
        target=task.target,
        group=task.group if grouped else None,
        noise=task.noise,
        settings=s,
        rule=rule,
        queries=torch.zeros_like(y),
        gradients=torch.zeros_like(y),
        steps=torch.zeros_like(y),
        model=model,
    )
    # x itself is the first iterate of a search without a radius; other starts are taken as given.
    narrow = leaves_by_rounding(task.x.dtype) and not nearest
    if narrow and s.start in _STARTS_INSIDE:
        round_inward_(state.x_adv, state.x, s.eps, s.norm)
    state.rule = rule.begin(state)
    done = None
    broken = torch.zeros_like(y)  # by group: 1 once a row of it has fooled the model
    remaining = Remaining(task.x) if compacts else None
    iterates = s.steps + (s.best != "last")
    for k in range(iterates):
        steps_on = k < s.steps
        differentiate = steps_on and rule.by_gradient
        kind: Hashable = rule.kind(k, s.steps) if steps_on else "last"
        if steps_on:
            state.rule.schedule(state, k)
        loss, logits, state.still, gradient = _forward(model, state, kind, differentiate, k == 0)
        if s.releases:
            state.queries += state.active
        if nearest:
            _keep_best(state, _nearness(state), None)
            state.active &= state.best.loss < 0  # no point is nearer than x itself
        if not steps_on:
            if not nearest:
                _keep_best(state, loss, None)
            state.active &= state.still  # the other rows have just fooled the model
            break
        if s.releases:
            unchecked_track(state.still, state.kappa, state.active, state.patience)
            if state.group is not None:
                broken.scatter_reduce_(0, state.group, (~state.active).long(), "amax")
                state.active &= broken[state.group] == 0
            state.steps += state.active
        else:
            state.kappa += state.still
        size = None if remaining is None else remaining(state.active)
        if size == 0:
            break
        grad = None
        if differentiate:
            grad, passes = gradient()
            state.gradients += passes * state.active if s.releases else passes
        if s.best != "last" and not nearest:
            _keep_best(state, loss, grad)
        grad = state.rule.observe(state, kind, loss, grad)
        active = state.active if s.releases else None
        state.rule.step(state, kind, grad, active)
        if narrow:
            round_inward_(state.x_adv, state.x, state.settings.eps, s.norm, active)
        if size is not None and worth_compacting(size, len(state.active), s.steps - k):
            done = _written_back(done, state)
            state = state.select(first_active(state.active, size))
    if not s.releases:
        state.queries += iterates
        state.steps += s.steps
    return _written_back(done, state)


def _forward(
    model: Callable[..., Any], state: State, kind: Hashable, differentiate: bool, first: bool
) -> tuple[Tensor, Tensor, Tensor, Callable[[], tuple[Tensor, int]]]:
    """Pass the current iterates through the model, and check the logits of the first iterates.

    Returns the loss (B,), the logits (B, C), which rows are still classified as y (B,), and a
    function that returns the gradient of the step and the number of backward passes it took. Loss
    and gradient are means over `eot` passes; logits and rows are those of the last pass.
    """
    s = state.settings
    losses, grads = [], []
    for remaining in reversed(range(s.eot)):
        # Writing into its input is an error for a model if that is a leaf, but not without
        # gradients.
        if differentiate:
            leaf = state.x_adv.detach().requires_grad_()
            logits = pick_logits(model(leaf), s.output, len(leaf))
        else:
            leaf = state.x_adv.clone()
            with torch.no_grad():
                logits = pick_logits(model(leaf), s.output, len(leaf))
        if first:
            check_first(logits, state.y, s.checks_values(state.x), differentiate)
            first = False
        loss, grad_logits, still = s.loss.at(logits, state.y, state.reference_logits, state.target)
        losses.append(loss)
        if remaining and differentiate:
            grads.append(input_gradient(logits, leaf, grad_logits))

    def gradient() -> tuple[Tensor, int]:
        return _mean([*grads, input_gradient(logits, leaf, grad_logits)]), s.eot

    direction = state.rule.direction
    if direction is not None:
        return _mean(losses), logits, still, lambda: direction(state, kind, logits, leaf, gradient)
    return _mean(losses), logits, still, gradient


_NO_GRADIENT = (
    "attack: the model's logits carry no gradient with respect to its input; it must not detach "
    "its input or run under no_grad"
)


def input_gradient(
    logits: Tensor, leaf: Tensor, grad_logits: Tensor, retain_graph: bool = False
) -> Tensor:
    """Return the gradient at `leaf`, the input of the pass that gave the logits, for the gradient
    `grad_logits` at the logits."""
    (grad,) = torch.autograd.grad(
        logits, leaf, grad_logits, allow_unused=True, retain_graph=retain_graph
    )
    if grad is None:
        raise ValueError(_NO_GRADIENT)
    return grad


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)


def _keep_best(state: State, loss: Tensor, grad: Tensor | None) -> None:
    if state.best is None:
        state.best = Best.first(state.x_adv, loss, grad)
    else:
        state.best.update(state.x_adv, loss, grad)


def _nearness(state: State) -> Tensor:
    """Return minus the distance from x for iterates that fool the model, -inf for the others."""
    away = distance(state.x_adv, state.x, state.settings.norm)
    return torch.where(state.active & ~state.still, -away, -torch.inf)


def _written_back(done: Perturbed | None, state: State) -> Perturbed:
    """Write the rows of the state into `done` and return it, the result of the whole batch so
    far."""
    best, x_adv = state.settings.best, state.x_adv
    if best in ("loss", "nearest"):
        x_adv = state.best.x_adv
    elif best == "fooled" and state.best is not None:
        x_adv = torch.where(per_row(state.active, x_adv), state.best.x_adv, x_adv)
    queries = state.settings.eot * state.queries
    found = Perturbed(x_adv, state.kappa, state.steps, queries, state.gradients)
    if done is None:
        return found
    for f in fields(Perturbed):
        getattr(done, f.name)[state.index] = getattr(found, f.name)
    return done


def _reference_logits(task: Task) -> Tensor | None:
    """Return the natural logits of a KL attack, which do not change during the attack."""
    s = task.settings
    if not s.loss.needs_reference_logits:
        return None
    with torch.no_grad():
        return pick_logits(task.model(task.x.clone()), s.output, len(task.x))
