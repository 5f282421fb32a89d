"""GAIRAT (Zhang et al., ICLR 2021): the functions of `GAIR.py`, `attack_generator.py` and
`earlystop.py` that its training scripts use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyadv import ops
from pyadv.compat._official import choose, linf_attack, normal_start, uniform_start
from pyadv.compat.fat import LOSSES, early_stopped
from pyadv.engine.losses import LossFunction
from pyadv.engine.starts import Start
from pyadv.menus import KAPPA_WEIGHTS, LossName
from pyadv.ops.arguments import check_choice
from pyadv.passes.borrow import device_of


def GAIR(num_steps: int, Kappa: Tensor, Lambda: float, func: str) -> Tensor:
    """Return weights of mean 1, (B,) float32.

    Args:
        func: "Tanh", "Sigmoid" or "Discrete".
    """
    kind = check_choice("gairat_weights", "kind", func.lower(), KAPPA_WEIGHTS)
    return ops.gairat_weights(Kappa.long(), num_steps, Lambda, kind, int_half=True)


def cwloss(output: Tensor, target: Tensor, confidence: float = 50) -> Tensor:
    """Return -sum_b max(z_y - max_{j != y} z_j + confidence, 0), for any number of classes."""
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
    """Return (x_adv, Kappa) of a PGD attack that counts correct iterates.

    Kappa is (B,) float32 on the data's device. Leaves the model in eval mode.

    Args:
        loss_fn: "cent", "cw" or "kl".
        category: "Madry", a uniform start from NumPy's generator, or "trades", a small normal one
            from torch's.
        rand_init: False starts at the data, which "kl" cannot.
    """
    model.eval()
    losses: dict[str, LossName | LossFunction] = {**LOSSES, "cw": _cw_rows}
    starts: dict[str, Start] = {"Madry": uniform_start(epsilon), "trades": normal_start}
    start: Start = choose("category", category, starts) if rand_init else "none"
    attack = linf_attack(choose("loss_fn", loss_fn, losses), start, epsilon, step_size, num_steps)
    found = attack.perturb(data, target, model=model)
    return found.x_adv, found.kappa.float()


def eval_clean(model: nn.Module, test_loader: DataLoader[Any]) -> tuple[float, float]:
    """Return (mean cross-entropy, accuracy) over the data set of a loader, in eval mode.

    Batches are moved to the model's device. Leaves the model in eval mode.
    """
    model.eval()
    return _evaluate(model, test_loader, lambda data, target: data)


def eval_robust(
    model: nn.Module,
    test_loader: DataLoader[Any],
    perturb_steps: int,
    epsilon: float,
    step_size: float,
    loss_fn: str,
    category: str,
    random: bool,
) -> tuple[float, float]:
    """Return (mean cross-entropy, accuracy) at the examples of `GA_PGD`, over the data set of a
    loader.

    Batches are moved to the model's device. Leaves the model in eval mode.

    Args:
        loss_fn, category: see `GA_PGD`.
        random: `GA_PGD`'s `rand_init`.
    """

    def attack(data: Tensor, target: Tensor) -> Tensor:
        args = (epsilon, step_size, perturb_steps, loss_fn, category, random)
        return GA_PGD(model, data, target, *args)[0]

    model.eval()
    return _evaluate(model, test_loader, attack)


def _evaluate(
    model: nn.Module, loader: DataLoader[Any], attack: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    data_set: Any = loader.dataset  # torch types data sets as if they had no length
    loss, correct, size = 0.0, 0, len(data_set)
    for data, target in loader:
        device = device_of(model, data)
        data, target = data.to(device), target.to(device)
        x = attack(data, target)
        with torch.no_grad():
            logits = model(x)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            correct += int((logits.argmax(1) == target).sum())
    return loss / size, correct / size


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
    """Return (x_adv, targets, x, count, Kappa) of an early-stopped attack that counts correct
    iterates, and judges each sample by its own label. Leaves the model in eval mode.

    Samples and targets come in the order of their release, as in the official code, or, with
    `original_order=True`, in the order of `data`. `count` is the number of steps of all samples
    together. Kappa is float32.

    Args:
        type: "fat" or "fat_for_mart" (cross-entropy), or "fat_for_trades" (KL).
        random: start uniformly in the ball, whatever the type, as the official code does; False
            starts at the data.
    """
    model.eval()
    losses: dict[str, LossName] = {"fat": "ce", "fat_for_mart": "ce", "fat_for_trades": "kl"}
    loss = choose("type", type, losses)
    start: Start = uniform_start(epsilon) if random else "none"
    if random and type == "fat_for_trades":
        torch.randn(data.shape)  # drawn by the official code and replaced
    found = early_stopped(
        model, data, target, step_size, epsilon, perturb_steps, tau, loss, start, omega
    )
    order = found.order(original_order)
    kappa = found.kappa[order].float()
    return found.x_adv[order], target[order], data[order], found.count, kappa
