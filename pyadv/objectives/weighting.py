"""Instance weights, with mean 1 over the whole batch.

The whole batch may be spread over processes or cut into micro-batches, so a weighting has two
methods: `values(step)` returns one value per sample of a forward pass (B,), or None for equal
weights in this step; `weights(values, step)` turns the values of all N samples of the batch into
their weights (N,).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.engine.attack import Attack
from pyadv.menus import MARGIN_NORMALIZES, MARGINS, KappaWeightName, MarginName, MarginNormalize
from pyadv.objectives.step import Schedule, Step, at_epoch


class Weighting(Protocol):
    """Anything with these two methods weighs the samples of an `Objective`."""

    def values(self, step: Step) -> Tensor | None:
        """Return the values (B,) that the weights depend on, or None for equal weights."""

    def weights(self, values: Tensor, step: Step) -> Tensor:
        """Return the weights (N,) of the samples of the whole batch, from their values (N,)."""


class GAIRATWeights:
    """GAIRAT's weights w(kappa), with mean 1 over the batch. Before `begin_epoch` (the burn-in) all
    samples weigh the same. See `ops.gairat_weights`."""

    def __init__(
        self,
        lam: Schedule = -1.0,
        kind: KappaWeightName = "tanh",
        begin_epoch: int = 1,
        int_half: bool = False,
    ):
        self.lam = lam
        self.kind = kind
        self.begin_epoch = begin_epoch
        self.int_half = int_half

    def values(self, step: Step) -> Tensor | None:
        _attack_of(step)
        return None if step.epoch < self.begin_epoch else step.kappa

    def weights(self, values: Tensor, step: Step) -> Tensor:
        lam = at_epoch(self.lam, step.epoch)
        steps = _attack_of(step).settings.steps
        return ops.gairat_weights(values, steps, lam, self.kind, int_half=self.int_half)


def _attack_of(step: Step) -> Attack:
    if step.attack is None:
        raise TypeError("GAIRATWeights needs an attack: weights depend on its kappa")
    return step.attack


class MAILWeights:
    """MAIL's weights sigma(-slope (margin - bias)) of a probabilistic margin. Before `begin_epoch`
    all samples weigh the same. See `ops.probabilistic_margin` and `ops.mail_weights`."""

    def __init__(
        self,
        margin: MarginName = "adv",
        slope: float = 10.0,
        bias: float = -0.5,
        normalize: MarginNormalize = "mean",
        begin_epoch: int = 1,
    ):
        checks.choice("margin", margin, MARGINS)
        checks.choice("normalize", normalize, MARGIN_NORMALIZES)
        self.margin = margin
        self.slope = slope
        self.bias = bias
        self.normalize = normalize
        self.begin_epoch = begin_epoch

    def values(self, step: Step) -> Tensor | None:
        if step.epoch < self.begin_epoch:
            return None
        if self.margin == "adv":
            return ops.probabilistic_margin(step.logits_adv, step.y)
        logits_adv = None if self.margin == "nat" else step.logits_adv
        return ops.probabilistic_margin(step.logits, step.y, logits_adv, self.margin)

    def weights(self, values: Tensor, step: Step) -> Tensor:
        return ops.mail_weights(values, self.slope, self.bias, self.normalize)


def batch_weights(weighting: Weighting, values: Tensor, step: Step) -> Tensor:
    """Return the weights of this process's samples, normalised over all processes that train the
    same DistributedDataParallel model.

    DDP averages the gradients of W processes. The weights of a process are multiplied by W times
    its share of the samples, so that a process with more samples counts for more.
    """
    if step.group is None:
        return weighting.weights(values, step)
    everywhere, first = _gathered(values, step.group)
    mine = weighting.weights(everywhere, step)[first : first + len(values)]
    return mine * (dist.get_world_size(step.group) * len(values) / len(everywhere))


def _gathered(values: Tensor, group: Any) -> tuple[Tensor, int]:
    """Return the values of all processes in order of rank, and the index of the first of ours."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    size = torch.tensor([len(values)], device=values.device)
    gathered = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(gathered, size, group=group)
    sizes = [int(s) for s in gathered]
    padded = values.new_zeros(max(sizes))  # all_gather needs equal shapes
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    everywhere = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
    return everywhere, sum(sizes[:rank])
