"""GAIRAT (Zhang et al., ICLR 2021): `GAIR.py`, and of `attack_generator.py` and `earlystop.py` what
training uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyadv import ops
from pyadv.compat._official import choose, linf_attack, normal_start, uniform_start
from pyadv.compat.fat import LOSSES, early_stopped


def GAIR(num_steps: int, Kappa: Tensor, Lambda: float, func: str) -> Tensor:
    """Weights of mean 1, (B,) float32.

    Args:
        func: "Tanh", "Sigmoid" or "Discrete".
    """
    return ops.gairat_weights(Kappa.long(), num_steps, Lambda, func.lower(), int_half=True)


def cwloss(output: Tensor, target: Tensor, confidence: float = 50) -> Tensor:
    """-sum_b max(z_y - max_{j != y} z_j + confidence, 0), for any number of classes."""
    return _cw_rows(output, target, confidence).sum()


def _cw_rows(output: Tensor, target: Tensor, confidence: float = 50) -> Tensor:
    real = output.gather(1, target[:, None])[:, 0]
    other = output.scatter(1, target[:, None], -torch.inf).amax(1)
    return -(real - other + confidence).clamp_min(0)


def GA_PGD(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    epsilon: float,
    step_size: float,
    num_steps: int,
    loss_fn: str,
    category: str,
    rand_init: bool,
) -> tuple[Tensor, Tensor]:
    """(x_adv, Kappa): PGD that counts correct iterates; Kappa is (B,) float32 on the data's device.
    Leaves the model in eval mode.

    Args:
        loss_fn: "cent", "cw" or "kl".
        category: "Madry", a uniform start from NumPy's generator, or "trades", a small normal one
            from torch's.
        rand_init: False starts at the data, which "kl" cannot.
    """
    model.eval()
    losses = {**LOSSES, "cw": _cw_rows}
    starts = {"Madry": uniform_start(epsilon), "trades": normal_start}
    start = choose("category", category, starts) if rand_init else "none"
    attack = linf_attack(choose("loss_fn", loss_fn, losses), start, epsilon, step_size, num_steps)
    found = attack.perturb(data, target, model=model)
    return found.x_adv, found.kappa.float()


def GA_earlystop(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    step_size: float,
    epsilon: float,
    perturb_steps: int,
    tau: int,
    type: str,
    random: bool,
    omega: float,
    *,
    original_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(x_adv, targets, x, count, Kappa) of the early-stopped attack that counts correct iterates,
    each sample judged by its own label. Leaves the model in eval mode.

    Samples come in the order of their release, as in the official code, and so do the targets;
    `original_order=True` leaves all as it came. `count` is the number of steps taken, of all
    samples together. Kappa is float32.

    Args:
        type: "fat" or "fat_for_mart" (cross-entropy), or "fat_for_trades" (KL).
        random: the start of every type is uniform, as it is in the official code.
    """
    model.eval()
    losses = {"fat": "ce", "fat_for_mart": "ce", "fat_for_trades": "kl"}
    loss = choose("type", type, losses)
    start = uniform_start(epsilon) if random else "none"
    if random and type == "fat_for_trades":
        torch.randn(data.shape)  # drawn by the official code and replaced
    found = early_stopped(
        model, data, target, step_size, epsilon, perturb_steps, tau, loss, start, omega
    )
    order = found.order(original_order)
    kappa = found.kappa[order].float()
    return found.x_adv[order], target[order], data[order], found.count, kappa
