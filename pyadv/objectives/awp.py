"""Adversarial weight perturbation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyadv.engine import checks
from pyadv.objectives.objective import Objective
from pyadv.objectives.step import Step, kept_buffers
from pyadv.passes.borrow import uncompiled, unwrap

_TINY = 1e-20  # as in the official code; a zero gradient then moves no weight


class AWP(Objective):
    """An objective evaluated at adversarially perturbed weights.

    Each matrix or kernel w moves by gamma ||w|| along the gradient of the loss. All attacks run
    before, at the unmoved weights. The returned loss is that at the moved weights, which are in
    place during the forward pass only: `.backward()` puts the gradient taken there on the
    parameters, whose values never change, so nothing has to be undone after the optimiser's step.
    AWP costs one more forward and backward pass. Each micro-batch moves the weights along its own
    gradient.

    Gradient checkpointing inside the model does not work with AWP, because it would recompute at
    the unmoved weights.

    Args:
        objective: the objective to minimise; AWP takes over its parts.
        gamma: size of the move relative to ||w||; 0.01 for AT, 0.005 for TRADES in the official
            code. With 0 the result is the objective itself.
        begin_epoch: first epoch (from 1) with moved weights.

    Differences to the official code: its optimiser applies weight decay to the moved weights (a
    share of gamma, at most), and its proxy's step size cancels in the normalisation.

    Source: Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020.
    """

    def __init__(self, objective: Objective, gamma: float = 0.01, begin_epoch: int = 1):
        if not isinstance(objective, Objective):
            raise TypeError(f"AWP wraps an objective, got {type(objective).__name__}")
        checks.size("gamma", gamma)
        self.__dict__.update(vars(objective))
        self.gamma = gamma
        self.begin_epoch = begin_epoch

    def evaluate(self, step: Step) -> Tensor:
        if step.epoch < self.begin_epoch:
            return super().evaluate(step)
        module = uncompiled(step.model)
        if not isinstance(module, nn.Module):
            raise TypeError(f"AWP needs a torch.nn.Module, got {type(module).__name__}")
        weights = _weights(module)
        self.run_attacks(step)
        with kept_buffers(module):
            loss = super().evaluate(step.again(unwrap(step.model)))
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
        moves: dict[Tensor, Tensor] = {
            w: self.gamma * w.detach().norm() / (g.norm() + _TINY) * g
            for w, g in zip(weights, self._averaged(grads, step), strict=True)
            if g is not None
        }
        with _moved(module, moves):
            return super().evaluate(step.again())

    @staticmethod
    def _averaged(grads: tuple[Tensor | None, ...], step: Step) -> tuple[Tensor | None, ...]:
        """Add up gradients over the processes, so that all of them move the weights alike."""
        for g in grads:
            if step.group is not None and g is not None:
                dist.all_reduce(g, group=step.group)
        return grads


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the matrices and kernels, by the rule of the official code. Raise ValueError if there
    are none."""
    found = [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and p.dim() > 1 and "weight" in name
    ]
    if not found:
        raise ValueError(
            "AWP moves the model's weights, but no parameter that requires a gradient has two or "
            'more dimensions and "weight" in its name'
        )
    return found


@contextlib.contextmanager
def _moved(module: nn.Module, moves: dict[Tensor, Tensor]) -> Iterator[None]:
    """Replace each weight w of the module by w + move inside the context.

    Gradients reach w unchanged. The parameters are put back at the end, also after an exception.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    sums = {w: w + move for w, move in moves.items()}
    try:
        for m in module.modules():
            for name, w in m._parameters.items():
                if w is not None and w in sums:
                    replaced.append((m._parameters, name, w))
        for parameters, name, own in replaced:
            parameters[name] = sums[own]
        yield
    finally:
        for parameters, name, own in replaced:
            parameters[name] = own
