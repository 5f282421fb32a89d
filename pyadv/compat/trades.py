"""TRADES (Zhang et al., ICML 2019): the function of `trades.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pyadv import ops
from pyadv.compat._official import linf_attack, training_attack
from pyadv.objectives import TRADES, Mean, Objective, Step, clean_cross_entropy


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
    official_passes: bool = True,
) -> Tensor:
    """Return the loss to call `.backward()` on.

    Leaves the model in train mode and the optimiser's gradients at zero.

    Args:
        distance: "l_inf"; "l_2", which takes steps of 2 epsilon / perturb_steps and ignores
            `step_size`; with anything else the loss is at the noise of the start.
        official_passes: make the three passes of the official code in train mode: x for the
            cross-entropy, then x_adv and x again for the KL term. False uses the first pass of x
            for both terms, and saves a third of the work in train mode. The loss and gradient of
            one step are the same, but BatchNorm's running statistics get one update less, so later
            steps differ. With dropout the first step differs too.
    """
    if distance == "l_2":

        def start(x: Tensor) -> Tensor:
            return _l2_examples(model, x, epsilon, perturb_steps)

        attack = linf_attack("ce", start, epsilon, step_size, 0)
    else:
        attack = training_attack("kl", epsilon, step_size, perturb_steps, distance)
    model.train()
    optimizer.zero_grad()
    if not official_passes:
        return TRADES(attack, beta, any_attack=True)(model, x_natural, y)
    objective = Objective(attack, clean_cross_entropy, clean_first=True)
    return (objective + Mean(_kl_of_a_second_pass, beta))(model, x_natural, y)


def _kl_of_a_second_pass(step: Step) -> Tensor:
    """Return KL(f(x) || f(x_adv)) (B,), where f(x) is a forward pass of its own, after f(x_adv)."""
    logits_adv = step.logits_adv
    return ops.trades_kl(logits_adv, step.forward(step.x))


def _l2_examples(model: nn.Module, x: Tensor, epsilon: float, steps: int) -> Tensor:
    """Return examples of an ascent on the KL term by SGD on normalised gradients.

    Each step ends with the projection onto the ball. The box comes before it, which is enough:
    shrinking towards x stays inside the box.
    """
    torch.randn(x.shape)  # the official code draws its other start here and does not use it
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
