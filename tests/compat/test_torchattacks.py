"""The attacks against torchattacks' expressions, from the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objective_parts import make_batch, make_net

from pyadv.compat import torchattacks

EPS, ALPHA, STEPS = 0.1, 0.03, 4


def gradient(net, x, y):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)[0]


def pgd(net, x, y, sign=1.0):
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv + sign * ALPHA * gradient(net, x_adv, y).sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return x_adv


def pgd_l2(net, x, y):
    delta = torch.empty_like(x).normal_()
    norms = delta.flatten(1).norm(dim=1)[:, None, None, None]
    delta = delta * torch.zeros_like(norms).uniform_(0, 1) / norms * EPS
    x_adv = (x + delta).clamp(0, 1)
    for _ in range(STEPS):
        g = gradient(net, x_adv, y)
        x_adv = x_adv + ALPHA * g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 1e-10)
        delta = x_adv - x
        norms = delta.flatten(1).norm(dim=1)[:, None, None, None]
        x_adv = (x + delta * (EPS / norms).clamp(max=1)).clamp(0, 1)
    return x_adv


CASES = {
    "pgd": (lambda net: torchattacks.PGD(net, EPS, ALPHA, STEPS), pgd),
    "pgdl2": (lambda net: torchattacks.PGDL2(net, EPS, ALPHA, STEPS), pgd_l2),
    "fgsm": (
        lambda net: torchattacks.FGSM(net, EPS),
        lambda net, x, y: (x + EPS * gradient(net, x, y).sign()).clamp(0, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_examples_from_the_same_seed(name):
    make, expression = CASES[name]
    net, (x, y) = make_net().double().eval(), make_batch()
    x = x.double()
    torch.manual_seed(5)
    ours = make(net)(x, y)
    state = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, expression(net, x, y), rtol=0, atol=1e-7)
    assert torch.equal(state, torch.rand(2))


def test_targets():
    net, (x, y) = make_net().double().eval(), make_batch()
    x, target = x.double(), (y + 1) % 4
    attack = torchattacks.PGD(net, EPS, ALPHA, STEPS)
    attack.set_mode_targeted_by_label()
    torch.manual_seed(5)
    ours = attack(x, target)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, pgd(net, x, target, sign=-1.0))
    attack.set_mode_default()
    torch.manual_seed(5)
    untargeted = attack(x, y)
    torch.manual_seed(5)
    torch.testing.assert_close(untargeted, pgd(net, x, y))


def test_without_a_random_start():
    net, (x, y) = make_net().eval(), make_batch()
    attack = torchattacks.PGD(net, EPS, EPS, 1, random_start=False)
    assert torch.equal(attack(x, y), torchattacks.FGSM(net, EPS)(x, y))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm, eps", [("Linf", 0.05), ("L2", 0.3)])
def test_apgd(norm, eps, loss):
    net, (x, y) = make_net().eval(), make_batch()
    state = torch.get_rng_state()
    attack = torchattacks.APGD(net, norm, eps, steps=8, n_restarts=2, seed=3, loss=loss)
    x_adv = attack(x, y)
    assert torch.equal(attack(x, y), x_adv) and torch.equal(torch.get_rng_state(), state)
    other = torchattacks.APGD(net, norm, eps, steps=8, n_restarts=2, seed=4, loss=loss)
    assert not torch.equal(other(x, y), x_adv)
    size = torch.linalg.vector_norm((x_adv - x).flatten(1), 2 if norm == "L2" else torch.inf, dim=1)
    assert (size <= eps + 1e-6).all() and size.max() > 0.9 * eps
    assert (net(x_adv).argmax(1) == y).sum() <= (net(x).argmax(1) == y).sum()
