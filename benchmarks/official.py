"""The inner loops of the training methods in the form of the authors' codes: with the same passes,
the same weight gradients, and the same loops over samples in Python.

The starts are arguments, so that results can be compared with pyadv's. Rewritten from the
repositories of TRADES (Zhang et al. 2019), MART (Wang et al. 2020), FAT (Zhang et al. 2020), GAIRAT
(Zhang et al. 2021) and EMR (Liu and Chan 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float) -> Tensor:
    x_adv = x_adv.detach() + alpha * grad.sign()
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0.0, 1.0)


def gairat_attack(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, alpha: float, eps: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Run GAIRAT's GA_PGD, which calls `loss.backward()` and updates kappa sample by sample."""
    model.eval()
    kappa = torch.zeros(len(x))
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        predicted = logits.max(1)[1]
        for i in range(len(predicted)):
            if predicted[i] == y[i]:
                kappa[i] += 1
        model.zero_grad()
        F.cross_entropy(logits, y, reduction="mean").backward()
        x_adv = _step(x_adv, x_adv.grad, x, alpha, eps)
    return x_adv.detach(), kappa.to(x)


def _pgd(model, x, y, start, alpha, eps, steps) -> Tensor:
    """Run the attack of MART and EMR, which computes input gradients only."""
    model.eval()
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = _step(x_adv, grad, x, alpha, eps)
    return x_adv.detach()


def at(model, x, y, start, alpha, eps, steps) -> Tensor:
    """Run the attack of FAT and GAIRAT without kappa."""
    model.eval()
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = _step(x_adv, x_adv.grad, x, alpha, eps)
    model.train()
    model.zero_grad()
    return F.cross_entropy(model(x_adv.detach()), y)


def trades(model, x, y, start, alpha, eps, steps, beta=6.0) -> Tensor:
    """Run the attack of TRADES, which computes the natural prediction again in every step, with its
    graph."""
    kl = nn.KLDivLoss(reduction="sum")
    model.eval()
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = kl(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = _step(x_adv, grad, x, alpha, eps)
    model.train()
    model.zero_grad()
    natural = F.cross_entropy(model(x), y)
    x_adv = x_adv.detach()
    robust = kl(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)) / len(x)
    return natural + beta * robust


def mart(model, x, y, start, alpha, eps, steps, beta=5.0) -> Tensor:
    x_adv = _pgd(model, x, y, start, alpha, eps, steps)
    model.train()
    model.zero_grad()
    logits, logits_adv = model(x), model(x_adv)
    p = F.softmax(logits_adv, dim=1)
    top = torch.argsort(p, dim=1)[:, -2:]
    rival = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
    boosted = F.cross_entropy(logits_adv, y) + F.nll_loss(torch.log(1.0001 - p + 1e-12), rival)
    q = F.softmax(logits, dim=1)
    true = torch.gather(q, 1, y[:, None]).squeeze(1)
    kl = nn.KLDivLoss(reduction="none")(torch.log(p + 1e-12), q)
    return boosted + beta * torch.mean(torch.sum(kl, dim=1) * (1.0000001 - true))


def gairat(model, x, y, start, alpha, eps, steps, lam=-1.0) -> Tensor:
    x_adv, kappa = gairat_attack(model, x, y, start, alpha, eps, steps)
    model.train()
    model.zero_grad()
    rows = F.cross_entropy(model(x_adv), y, reduction="none")
    half = int(steps / 2)
    weights = ((lam + (half - kappa) * 5 / half).tanh() + 1) / 2
    weights = weights * len(weights) / weights.sum()
    return rows.mul(weights).mean()


def earlystop(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    order: Tensor,
    alpha: float,
    eps: float,
    steps: int,
    tau: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run FAT's attack, which also computes weight gradients and decides sample by sample.

    Returns:
        x_adv and the index of each sample, in the order of release.
    """
    model.eval()
    x_adv, patience = x if start is None else start, [tau] * len(x)
    released, released_order = [], []
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        predicted = logits.max(1)[1]
        out, stay = [], []
        for i in range(len(predicted)):
            if predicted[i] == y[i]:
                stay.append(i)
            elif patience[i] == 0:
                out.append(i)
            else:
                patience[i] -= 1
                stay.append(i)
        model.zero_grad()
        F.cross_entropy(logits, y).backward()
        grad = x_adv.grad
        if out:
            released.append(x_adv.detach()[out])
            released_order.append(order[out])
        if not stay:
            break
        patience = [patience[i] for i in stay]
        x, y, order = x[stay], y[stay], order[stay]
        x_adv = _step(x_adv[stay], grad[stay], x, alpha, eps)
    else:
        released.append(x_adv)
        released_order.append(order)
    return torch.cat(released).detach(), torch.cat(released_order)


def fat(model, x, y, start, alpha, eps, steps, tau=0) -> Tensor:
    order = torch.arange(len(x), device=x.device)
    x_adv, index = earlystop(model, x, y, order, alpha, eps, steps, tau, start)
    model.train()
    model.zero_grad()
    return F.cross_entropy(model(x_adv), y[index])


def emr_penalty(model: nn.Module, x_adv: Tensor, temperature: float) -> Tensor:
    """Return EMR's loss, which is differentiated through the backward pass and divided by the batch
    size twice."""
    model.eval()
    leaf = x_adv.detach().requires_grad_()
    logits = model(leaf)
    p = F.softmax(logits / temperature, dim=1).detach()
    (grad,) = torch.autograd.grad((p * logits).sum(1).mean(), leaf, create_graph=True)
    return grad.pow(2).sum()


def at_emr(model, x, y, start, alpha, eps, steps, lam=3.0, temperature=40.0) -> Tensor:
    x_adv = _pgd(model, x, y, start, alpha, eps, steps)
    model.train()
    model.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    return loss + lam * emr_penalty(model, x_adv, temperature)
