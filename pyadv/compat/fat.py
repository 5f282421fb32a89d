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
from pyadv.menus import LossName

LOSSES: dict[str, LossName] = {"cent": "ce", "kl": "kl"}


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
    """Return (x_adv, targets, x, count) of an early-stopped attack. Leaves the model in eval mode.

    Samples and targets come in the order of their release, as in the official code, or, with
    `original_order=True`, in the order of `data`. `count` is the number of steps of all samples
    together.

    Args:
        randominit_type: "uniform_randominit" (NumPy's generator) or
            "normal_distribution_randominit" (torch's).
        loss_fn: "cent" or "kl".
        omega: standard deviation of the noise of each step. Noise is drawn for omega = 0 too.
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
    """The end of an early-stopped attack, in the original order of the samples."""

    x_adv: Tensor
    kappa: Tensor
    steps: Tensor  # number of steps before the release

    @property
    def count(self) -> int:
        return int(self.steps.sum())

    def order(self, original: bool) -> Tensor:
        index = torch.arange(len(self.steps), device=self.steps.device)
        return index if original else self.steps.argsort(stable=True)


@dataclass
class _NoisyStep(StepRule):
    """The step of the official code: noise from torch's CPU generator for the samples still
    attacked is added before the projection."""

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
    loss: LossName,
    start: Start,
    omega: float,
) -> Released:
    """Run the attack that FAT and GAIR-FAT share."""
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
