"""The official codes written again, plainly and for the CPU, one sample at a time where that is
clearer. The tests compare `pyadv.compat` with these functions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def kl_sum(z_adv, z):
    q = z.softmax(1)
    return (q * (q.log() - z_adv.log_softmax(1))).sum()


def small_noise(x):
    return x + (0.001 * torch.randn(x.shape)).to(x)


def numpy_noise(x, eps):
    noise = torch.from_numpy(np.random.uniform(-eps, eps, x.shape)).float()
    return (x + noise).clamp(0, 1)


def sign_steps(model, x, x_adv, loss, alpha, eps, steps):
    for _ in range(steps):
        leaf = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(model(leaf)), leaf)
        x_adv = x_adv.detach() + alpha * g.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def trades(model, x, y, alpha, eps, steps, beta, distance="l_inf"):
    model.eval()
    x_adv = small_noise(x)
    if distance == "l_inf":
        x_adv = sign_steps(model, x, x_adv, lambda z: kl_sum(z, model(x)), alpha, eps, steps)
    elif distance == "l_2":
        delta = (0.001 * torch.randn(x.shape)).to(x)
        for _ in range(steps):
            leaf = delta.detach().requires_grad_()
            (g,) = torch.autograd.grad(-kl_sum(model(x + leaf), model(x)), leaf)
            for i in range(len(x)):
                size = g[i].norm()
                g[i] = torch.randn_like(g[i]) if size == 0 else g[i] / size
            delta = (x + delta - 2 * eps / steps * g).clamp(0, 1) - x
            for i in range(len(x)):
                delta[i] *= min(1.0, float(eps / delta[i].norm()))
        x_adv = x + delta
    x_adv = x_adv.clamp(0, 1).detach()
    model.train()
    ce = F.cross_entropy(model(x), y)
    return ce + beta * kl_sum(model(x_adv), model(x)) / len(x)


def mart_terms(model, x, x_adv, y):
    z, z_adv = model(x), model(x_adv)
    p, q = z_adv.softmax(1), z.softmax(1)
    rivals = [
        max((j for j in range(p.shape[1]) if j != t), key=lambda j: r[j])
        for r, t in zip(p, y, strict=True)
    ]
    pm = p[range(len(y)), rivals]
    bce = F.cross_entropy(z_adv, y, reduction="none") - (1.0001 - pm + 1e-12).log()
    wrong = 1.0000001 - q[range(len(y)), y]
    return z_adv, bce, ((q * (q.log() - (p + 1e-12).log())).sum(1) * wrong).mean()


def ce_examples(model, x, y, alpha, eps, steps, distance="l_inf"):
    model.eval()
    x_adv = small_noise(x)
    if distance == "l_inf":
        x_adv = sign_steps(model, x, x_adv, lambda z: F.cross_entropy(z, y), alpha, eps, steps)
    model.train()
    return x_adv.clamp(0, 1).detach()


def mart(model, x, y, alpha, eps, steps, beta, distance="l_inf"):
    x_adv = ce_examples(model, x, y, alpha, eps, steps, distance)
    _, bce, robust = mart_terms(model, x, x_adv, y)
    return bce.mean() + beta * robust


def pm(z, y):
    p = z.detach().softmax(1)
    return torch.stack(
        [max(r[j] for j in range(len(r)) if j != t) - r[t] for r, t in zip(p, y, strict=True)]
    )


def mail(model, x, y, bias, slope, alpha, eps, steps, beta, method):
    def weights(z):
        return 3 * torch.sigmoid((pm(z, y) + bias) * slope)

    if method == "trades":
        model.eval()
        start = small_noise(x)
        x_adv = sign_steps(model, x, start, lambda z: kl_sum(z, model(x)), alpha, eps, steps)
        model.train()
        z, z_adv = model(x), model(x_adv)
        q = z.softmax(1)
        kl = (q * (q.log() - z_adv.log_softmax(1))).sum(1)
        return F.cross_entropy(z, y) + beta * (kl * weights(z_adv)).mean()
    x_adv = ce_examples(model, x, y, alpha, eps, steps)
    if method == "mart":
        z_adv, bce, robust = mart_terms(model, x, x_adv, y)
        return (bce * weights(z_adv)).mean() + beta * robust
    z_adv = model(x_adv)
    return (F.cross_entropy(z_adv, y, reduction="none") * weights(z_adv)).mean()


def gair(steps, kappa, lam, func):
    half = int(steps / 2)
    a = lam + (half - kappa) * 5 / half
    w = {"Tanh": (a.tanh() + 1) / 2, "Sigmoid": a.sigmoid()}.get(
        func, (steps + 1 - kappa) / (steps + 1)
    )
    return w * len(w) / w.sum()


def cw(z, y):
    total = 0.0
    for row, t in zip(z, y, strict=True):
        other = max(row[j] for j in range(len(row)) if j != t)
        total = total - (row[t] - other + 50).clamp_min(0)
    return total


def ga_pgd(model, x, y, eps, alpha, steps, loss_fn, category, rand_init):
    model.eval()
    losses = {
        "cent": lambda z: F.cross_entropy(z, y),
        "cw": lambda z: cw(z, y),
        "kl": lambda z: kl_sum(z, model(x)),
    }
    x_adv = x
    if rand_init:
        x_adv = small_noise(x) if category == "trades" else numpy_noise(x, eps)
    kappa = torch.zeros(len(x))
    for _ in range(steps):
        kappa += (model(x_adv).argmax(1) == y).float()
        x_adv = sign_steps(model, x, x_adv, losses[loss_fn], alpha, eps, 1)
    return x_adv, kappa


def earlystop(model, x, y, alpha, eps, steps, tau, start, loss_fn, omega):
    """Run FAT's loop, which is also GAIR-FAT's if each sample is judged by its own label."""
    model.eval()
    z_nat = model(x).detach()
    alive, left, kappa = list(range(len(x))), [tau] * len(x), [0] * len(x)
    x_adv, order, count = start.clone(), [], 0
    for _ in range(steps):
        leaf = x_adv[alive].detach().requires_grad_()
        z = model(leaf)
        loss = F.cross_entropy(z, y[alive]) if loss_fn == "cent" else kl_sum(z, z_nat[alive])
        (g,) = torch.autograd.grad(loss, leaf)
        stay = []
        for row, i in enumerate(alive):
            if z[row].argmax() == y[i]:
                kappa[i] += 1
            elif left[i] == 0:
                order.append(i)
                continue
            else:
                left[i] -= 1
            stay.append(row)
        alive = [alive[row] for row in stay]
        if not alive:
            break
        moved = x_adv[alive] + alpha * g[stay].sign()
        moved = moved + (omega * torch.randn(moved.shape)).to(x)
        near = x[alive]
        x_adv[alive] = torch.min(torch.max(moved, near - eps), near + eps).clamp(0, 1)
        count += len(alive)
    order += alive
    return x_adv[order], y[order], x[order], count, torch.tensor(kappa)[order].float()


def emr(model, x, temperature):
    x = x.detach().requires_grad_()
    z = model(x)
    p = (z / temperature).softmax(1).detach()
    (g,) = torch.autograd.grad((p * z).sum() / len(x), x, create_graph=True)
    return g.square().sum()
