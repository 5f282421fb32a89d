"""TRADES (Zhang et al., ICML 2019): the function of `trades.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pyadv.compat._official import linf_attack, training_attack
from pyadv.objectives import TRADES


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    official_passes: bool = False,
) -> Tensor:
    """The loss to call `.backward()` on. Leaves the model in train mode and the optimiser's
    gradients at zero.

    Args:
        distance: "l_inf"; "l_2", which takes steps of 2 epsilon / perturb_steps and no notice of
            `step_size`; anything else trains on the noise of the start.
        official_passes: forward x a second time in train mode, as the official code does for the
            KL term: the same loss, and one update more of BatchNorm's running statistics.
    """
    if distance == "l_2":

        def start(x: Tensor) -> Tensor:
            return _l2_examples(model, x, epsilon, perturb_steps)

        attack = linf_attack("ce", start, epsilon, step_size, 0)
    else:
        attack = training_attack("kl", epsilon, step_size, perturb_steps, distance)
    model.train()
    optimizer.zero_grad()
    loss = TRADES(attack, beta, any_attack=True)(model, x_natural, y)
    if official_passes:
        with torch.no_grad():
            model(x_natural)
    return loss


def _l2_examples(model: nn.Module, x: Tensor, epsilon: float, steps: int) -> Tensor:
    """Ascent on the KL term by SGD on normalised gradients. Each step ends with the ball, not the
    box, in which shrinking towards x stays."""
    torch.randn(x.shape)  # of the official code's other start, which "l_2" does not use
    delta = (0.001 * torch.randn(x.shape)).to(x)
    with torch.no_grad():
        q = model(x).softmax(1)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        kl = F.kl_div(model(x + delta).log_softmax(1), q, reduction="sum")
        (grad,) = torch.autograd.grad(kl, delta)
        norms = grad.flatten(1).norm(dim=1)
        ascent = grad / norms.reshape(-1, *(1,) * (x.dim() - 1))
        if (norms == 0).any():
            ascent[norms == 0] = -torch.randn_like(grad[norms == 0])
        delta = delta.detach() + epsilon / steps * 2 * ascent
        delta = ((x + delta).clamp(0, 1) - x).renorm(p=2, dim=0, maxnorm=epsilon)
    return (x + delta).clamp(0, 1)
