"""FAT (Zhang et al., ICML 2020): the function of `earlystop.py`, for data of any shape."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyadv import ops
from pyadv.attacks import FriendlyPGD
from pyadv.compat._official import choose, clipped_normal_start, uniform_start
from pyadv.engine.rules import StepRule
from pyadv.engine.starts import Start
from pyadv.engine.state import State

LOSSES = {"cent": "ce", "kl": "kl"}


def earlystop(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    step_size: float,
    epsilon: float,
    perturb_steps: int,
    tau: int,
    randominit_type: str,
    loss_fn: str,
    rand_init: bool = True,
    omega: float = 0,
    *,
    original_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(x_adv, targets, x, count) of the early-stopped attack. Leaves the model in eval mode.

    Samples come in the order of their release, as in the official code, and so do the targets;
    `original_order=True` leaves all as it came. `count` is the number of steps taken, of all
    samples together.

    Args:
        randominit_type: "uniform_randominit" (NumPy's generator) or
            "normal_distribution_randominit" (torch's).
        loss_fn: "cent" or "kl".
        omega: standard deviation of the noise of each step. It is drawn for 0, too.
    """
    model.eval()
    starts = {
        "normal_distribution_randominit": clipped_normal_start,
        "uniform_randominit": uniform_start(epsilon),
    }
    start = choose("randominit_type", randominit_type, starts) if rand_init else "none"
    loss = choose("loss_fn", loss_fn, LOSSES)
    found = early_stopped(
        model, data, target, step_size, epsilon, perturb_steps, tau, loss, start, omega
    )
    order = found.order(original_order)
    return found.x_adv[order], target[order], data[order], found.count


@dataclass
class Released:
    """Where the samples ended, in their original order."""

    x_adv: Tensor
    kappa: Tensor
    steps: Tensor  # before the release

    @property
    def count(self) -> int:
        return int(self.steps.sum())

    def order(self, original: bool) -> Tensor:
        index = torch.arange(len(self.steps), device=self.steps.device)
        return index if original else self.steps.argsort(stable=True)


@dataclass
class _NoisyStep(StepRule):
    """The official step: noise from torch's CPU generator for the samples still attacked, added
    before the one projection."""

    omega: float

    def step(self, state: State, kind: Hashable, grad: Tensor, active: Tensor | None) -> None:
        s = state.settings
        noisy = state.x_adv.clone()
        kept = slice(None) if active is None else active
        noise = torch.randn(noisy[kept].shape)
        noisy[kept] += (self.omega * noise).to(noisy)
        ops.linf_step(noisy, grad, state.x, s.alpha, s.eps, s.lo, s.hi, active, out=state.x_adv)


def early_stopped(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    step_size: float,
    epsilon: float,
    perturb_steps: int,
    tau: int,
    loss: str,
    start: Start,
    omega: float,
) -> Released:
    """What FAT and GAIR-FAT do alike."""
    attack = FriendlyPGD(
        eps=epsilon,
        alpha=step_size,
        steps=perturb_steps,
        tau=tau,
        loss=loss,
        start=start,
        grad_mode="autograd",
        scale="exact",
    )
    attack.settings = replace(attack.settings, rule=_NoisyStep(omega))
    found = attack.perturb(data, target, model=model)
    return Released(found.x_adv, found.kappa, found.steps)
