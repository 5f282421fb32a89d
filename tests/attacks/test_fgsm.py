"""FGSM and MI-FGSM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import ConvNet, RowLinear

from pyadv.attacks import FGSM, MIFGSM, PGD, fgsm, mifgsm


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    return ConvNet().to(device).eval()


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(6, 3, 5, 5, generator=generator)
    return x.to(device), (torch.arange(6) % 4).to(device)


def gradient(net, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)[0]


def test_fgsm(net, batch):
    x, y = batch
    expected = (x + 0.1 * gradient(net, x, y).sign()).clamp(0, 1)
    assert torch.equal(FGSM(net, eps=0.1)(x, y), expected)
    assert torch.equal(fgsm(net, x, y, eps=0.1), expected)
    assert fgsm.__name__ == "fgsm" and "FGSM" in fgsm.__doc__


def test_fgsm_of_a_linear_model_is_the_optimum(device):
    x = torch.rand(5, 40, device=device)
    y = torch.tensor([0, 1, 0, 1, 1], device=device)
    model = RowLinear(40, classes=2).to(device)
    w = model.weight.detach()
    toward = w[1 - y] - w[y]
    torch.testing.assert_close(FGSM(model, eps=0.2)(x, y), (x + 0.2 * toward.sign()).clamp(0, 1))
    l2 = FGSM(model, eps=0.2, norm="L2", lo=None, hi=None)(x, y)
    torch.testing.assert_close(l2, x + 0.2 * F.normalize(toward))


def test_fgsm_takes_no_step_size():
    with pytest.raises(TypeError, match="alpha"):
        FGSM(alpha=0.1)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_mifgsm_is_the_papers_loop(decay, net, batch):
    x, y = batch
    eps, steps = 0.1, 6
    total, x_adv = 0, x
    for _ in range(steps):
        g = gradient(net, x_adv, y)
        total = decay * total + g / g.abs().sum((1, 2, 3), keepdim=True)
        x_adv = x_adv + eps / steps * total.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    torch.testing.assert_close(MIFGSM(net, eps=eps, steps=steps, decay=decay)(x, y), x_adv)
    torch.testing.assert_close(mifgsm(net, x, y, eps=eps, steps=steps, decay=decay), x_adv)
    plain = PGD(net, eps=eps, alpha=eps / steps, steps=steps, start="none")(x, y)
    assert not torch.equal(plain, x_adv), "momentum changes nothing here"


def test_mifgsm_without_memory_is_pgd(net, batch):
    x, y = batch
    settings = dict(eps=0.1, alpha=0.03, steps=4, start="none")
    assert torch.equal(MIFGSM(net, decay=0.0, **settings)(x, y), PGD(net, **settings)(x, y))


def test_mifgsm_recovers_from_a_flat_step(batch):
    """A gradient of zeros or infinities leaves no NaN in the momentum."""
    x, y = batch
    inner = RowLinear(75, classes=4).to(x.device)
    calls = []

    def model(v):
        calls.append(1)
        factor = {1: 0.0, 2: float("inf")}.get(len(calls), 1.0)
        return inner(v.detach() + factor * (v - v.detach()))

    attack = MIFGSM(model, eps=0.5, alpha=0.1, steps=4, lo=None, hi=None, validate=False)
    x_adv = attack(x, y)
    torch.testing.assert_close((x_adv - x).abs().max(), torch.tensor(0.2, device=x.device))


def test_mifgsm_momentum_follows_released_rows(batch):
    x, y = batch
    model = RowLinear(75, classes=4).to(x.device)
    y = model(x).argmax(1)
    settings = dict(eps=0.2, alpha=0.01, steps=12, best="fooled")
    compacted = MIFGSM(model, compact=True, **settings)(x, y)
    assert torch.equal(compacted, MIFGSM(model, compact=False, **settings)(x, y))


@pytest.mark.parametrize("decay", [-1.0, float("nan")])
def test_mifgsm_refuses(decay):
    with pytest.raises(ValueError, match="decay must be a finite number >= 0"):
        MIFGSM(decay=decay)
