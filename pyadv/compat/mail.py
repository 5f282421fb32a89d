"""MAIL (Liu et al., NeurIPS 2021): the functions of `mail_loss.py`, for any number of classes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from pyadv import ops
from pyadv.compat._official import training_attack
from pyadv.menus import LossName, MarginNormalize, WeightedBase
from pyadv.objectives import MAIL

__all__ = ["PM", "mail_loss", "weight_assign"]

NORMALIZE: MarginNormalize = "x3"  # as in the official code; the paper has "mean"


def PM(logit: Tensor, target: Tensor) -> Tensor:
    """Return the largest other probability minus that of the target, (B,)."""
    return -ops.probabilistic_margin(logit, target)


def weight_assign(logit: Tensor, target: Tensor, bias: float, slope: float) -> Tensor:
    """Return 3 sigma((PM + bias) slope), (B,), without gradient."""
    return ops.mail_weights(ops.probabilistic_margin(logit, target), slope, bias, NORMALIZE)


def mail_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    bias: float,
    slope: float,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
    method: str = "mart",
    *,
    normalize: MarginNormalize = NORMALIZE,
) -> Tensor:
    """Return the loss to call `.backward()` on.

    Leaves the model in train mode and the optimiser's gradients at zero.

    Args:
        distance: "l_inf"; with anything else the loss is at the noise of the start.
        method: a name that contains "mart", "trades" or "at", looked for in this order.
        normalize: the weights are 3 times a sigmoid ("x3", the official code), have mean 1
            ("mean", the paper), or are the sigmoid itself ("none").

    Raises:
        RuntimeError: `method` contains none of the three names.
    """
    bases: tuple[WeightedBase, ...] = ("mart", "trades", "at")
    base = next((name for name in bases if name in method), None)
    if base is None:
        raise RuntimeError(f"invalid method name: {method!r} has none of mart, trades, at in it")
    loss: LossName = "kl" if "trades" in method else "ce"
    attack = training_attack(loss, epsilon, step_size, perturb_steps, distance)
    model.train()
    optimizer.zero_grad()
    objective = MAIL(attack, base, "adv", slope, bias, beta, normalize=normalize, any_attack=True)
    return objective(model, x_natural, y)
