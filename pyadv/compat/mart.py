"""MART (Wang et al., ICLR 2020): the function of `mart.py`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from pyadv.compat._official import training_attack
from pyadv.objectives import MART


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
) -> Tensor:
    """Return the loss to call `.backward()` on.

    Leaves the model in train mode and the optimiser's gradients at zero. With any `distance` but
    "l_inf" the loss is at the noise of the start.
    """
    attack = training_attack("ce", epsilon, step_size, perturb_steps, distance)
    model.train()
    optimizer.zero_grad()
    return MART(attack, beta)(model, x_natural, y)
