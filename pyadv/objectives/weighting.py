"""How much each sample counts: weights of mean 1 over the whole batch, also where the batch is
spread over processes or cut into micro-batches.

A weighting has two methods, so that what is normalised need not be what one forward pass saw:
`values(step)` is what a sample's weight depends on, (B,), or None for equal weights in this step;
`weights(values, step)` are the weights of all samples of the batch, (N,).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.objectives.step import Schedule, Step, at_epoch


class Weighting(Protocol):
    def values(self, step: Step) -> Tensor | None: ...

    def weights(self, values: Tensor, step: Step) -> Tensor: ...


class GAIRATWeights:
    """w(kappa) with mean 1 over the batch from `begin_epoch` on, no weights before (the burn-in).
    See `ops.gairat_weights`."""

    def __init__(
        self, lam: Schedule = -1.0, kind: str = "tanh", begin_epoch: int = 1, int_half: bool = False
    ):
        self.lam = lam
        self.kind = kind
        self.begin_epoch = begin_epoch
        self.int_half = int_half

    def values(self, step: Step) -> Tensor | None:
        if step.attack is None:
            raise TypeError("GAIRATWeights needs an attack, whose kappa it weighs by")
        return None if step.epoch < self.begin_epoch else step.kappa

    def weights(self, values: Tensor, step: Step) -> Tensor:
        lam = at_epoch(self.lam, step.epoch)
        steps = step.attack.settings.steps
        return ops.gairat_weights(values, steps, lam, self.kind, int_half=self.int_half)


class MAILWeights:
    """sigma(-slope (margin - bias)) of a probabilistic margin, from `begin_epoch` on. See
    `ops.probabilistic_margin` for the margins and `ops.mail_weights` for the rest."""

    def __init__(
        self,
        margin: str = "adv",
        slope: float = 10.0,
        bias: float = -0.5,
        normalize: str = "mean",
        begin_epoch: int = 1,
    ):
        checks.choice("margin", margin, ("nat", "adv", "dif", "dif_conf"))
        checks.choice("normalize", normalize, ("mean", "x3", "none"))
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
    """The weights of this process's samples, normalised over those of all processes that train
    the same DistributedDataParallel model.

    DDP averages the gradients of W processes; so that a process with more samples than others
    counts for more, its weights are multiplied by its share of the samples times W.
    """
    if step.group is None:
        return weighting.weights(values, step)
    everywhere, first = _gathered(values, step.group)
    mine = weighting.weights(everywhere, step)[first : first + len(values)]
    return mine * (dist.get_world_size(step.group) * len(values) / len(everywhere))


def _gathered(values: Tensor, group: Any) -> tuple[Tensor, int]:
    """The values of all processes in order of rank, and where this one's begin."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    size = torch.tensor([len(values)], device=values.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    sizes = [int(s) for s in sizes]
    padded = values.new_zeros(max(sizes))  # all_gather wants equal shapes
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    everywhere = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
    return everywhere, sum(sizes[:rank])
