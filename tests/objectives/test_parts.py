"""AWP, the norm penalty, and gradient accumulation over micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from objective_parts import attack, gradients
from torch import nn

from pyadv.objectives import (
    AT,
    AWP,
    EMR,
    GAIRAT,
    GAIRTRADES,
    MAIL,
    MART,
    NormPenalty,
    Objective,
    Standard,
)
from pyadv.ops import NormProduct


class TestAWP:
    def test_follows_the_official_proxy(self, net, batch):
        """A copy takes one SGD step up the loss, rescaled per tensor to gamma times the norm of the
        weights. Loss and gradient are those of the copy; the parameters keep their values."""
        x, y = batch
        proxy, moved = copy.deepcopy(net), copy.deepcopy(net)
        before = copy.deepcopy(net.state_dict())
        objective = AWP(AT(attack()), gamma=0.05)
        loss = objective(net, x, y)
        for name, p in net.named_parameters():
            assert torch.equal(p, before[name])
        assert int(net[1].num_batches_tracked) == 1  # the proxy's pass is not counted
        x_adv = objective.last["x_adv"]
        F.cross_entropy(proxy(x_adv), y).backward()
        with torch.no_grad():
            for p, q in zip(proxy.parameters(), moved.parameters(), strict=True):
                if q.dim() > 1:
                    d = 0.01 * p.grad
                    q += 0.05 * d * q.norm() / (d.norm() + 1e-20)
        expected = F.cross_entropy(moved(x_adv), y)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(gradients(net, loss), gradients(moved, expected), strict=True):
            torch.testing.assert_close(a, b)

    def test_nothing_moves_without_gamma_or_before_its_epoch(self, net, batch):
        net.eval()
        expected = AT(attack())(net, *batch)
        torch.testing.assert_close(AWP(AT(attack()), gamma=0.0)(net, *batch), expected)
        torch.testing.assert_close(AWP(AT(attack()), begin_epoch=2)(net, *batch), expected)

    def test_raises_the_loss(self, net, batch):
        net.eval()
        assert AWP(AT(attack()))(net, *batch) > AT(attack())(net, *batch)

    def test_weights_come_back_after_an_error(self, net, batch):
        def fails(step):
            if not isinstance(step.model[0]._parameters["weight"], nn.Parameter):
                raise ArithmeticError
            return F.cross_entropy(step.logits_adv, step.y, reduction="none")

        with pytest.raises(ArithmeticError):
            AWP(Objective(attack(), fails))(net, *batch)
        assert all(isinstance(p, nn.Parameter) for p in net.parameters())
        assert len(list(net.parameters())) == 6 and not net[0]._backward_hooks

    def test_shared_weights_move_once(self, device):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        net = nn.Sequential(layer, nn.ReLU(), layer).to(device)
        loss = AWP(Standard(), gamma=0.1)(
            net, torch.rand(8, 4, device=device), torch.arange(8, device=device) % 4
        )
        loss.backward()
        assert net[2] is net[0] and net[0].weight.grad.isfinite().all()

    def test_takes_what_is_added(self, net, batch):
        total = AWP(MART(attack())) + EMR(0.1)
        assert len(total.regularisers) == 2 and isinstance(total, AWP)
        assert total(net, *batch).isfinite()

    def test_refuses(self):
        with pytest.raises(TypeError, match="AWP wraps an objective, got PGD"):
            AWP(attack())
        with pytest.raises(ValueError, match="gamma must be a finite number >= 0"):
            AWP(Standard(), gamma=-1.0)
        x = torch.rand(4, 3)
        with pytest.raises(TypeError, match="AWP needs a torch.nn.Module, got function"):
            AWP(Standard())(lambda x: x, x, torch.zeros(4, dtype=torch.int64))
        frozen = torch.nn.Linear(3, 2)
        frozen.weight.requires_grad_(False)
        with pytest.raises(ValueError, match='AWP moves the model\'s weights, but no .*"weight"'):
            AWP(Standard())(frozen, x, torch.zeros(4, dtype=torch.int64))


class TestNormPenalty:
    @pytest.mark.parametrize("kind", ["frobenius", "spectral"])
    def test_adds_the_logarithm_of_the_product(self, kind, net, batch):
        x, y = batch
        net.eval()
        product = NormProduct(net, (1, 6, 6), kind).eval()
        penalty = NormPenalty(lambda epoch: 0.1 * epoch, product)
        total = (Standard() + penalty)(net, x, y, epoch=2)
        torch.testing.assert_close(total, Standard()(net, x, y) + 0.2 * product())

    def test_moves_no_factor_between_layers(self, net, batch):
        """Scaling one layer up and the next down by the same factor does not change the penalty."""
        penalty = NormPenalty(1.0, NormProduct(net, (1, 6, 6)))
        before = float(penalty.product())
        with torch.no_grad():
            net[0].weight *= 3
            net[5].weight /= 3
        assert float(penalty.product()) == pytest.approx(before, rel=1e-5)

    def test_saves_its_power_iteration(self, net, batch):
        def make():
            return Standard() + NormPenalty(0.1, NormProduct(net, (1, 6, 6), "spectral"))

        first = make()
        for _ in range(3):
            first(net, *batch)
        again = make()
        again.load_state_dict(first.state_dict())
        states = (o.state_dict()["regulariser0"] for o in (first, again))
        for a, b in zip(*(s.values() for s in states), strict=True):
            assert torch.equal(a, b)

    def test_refuses(self):
        with pytest.raises(TypeError, match="product must be a NormProduct, got float"):
            NormPenalty(1.0, 2.0)


MICRO = {
    "gairat": lambda: GAIRAT(attack()),
    "gair-trades": lambda: GAIRTRADES(attack(loss="kl")),
    "mail-at": lambda: MAIL(attack()),
    "mail-mart": lambda: MAIL(attack(), "mart", margin="dif"),
    "mart+emr": lambda: MART(attack()) + EMR(0.5),
    "emr official": lambda: Standard() + EMR(0.5, reduction="official"),
    "awp burn-in": lambda: AWP(GAIRAT(attack(), begin_epoch=2), begin_epoch=2),
}


@pytest.mark.parametrize("name", MICRO)
def test_micro_batches_add_up_to_the_batch(name, net, batch):
    x, y = batch[0].double(), batch[1]
    net = net.double().eval()  # in train mode each micro-batch has its own statistics
    expected = MICRO[name]()(net, x, y)
    grads = gradients(net, expected)
    cuts = [slice(0, 5), slice(5, 16), slice(16, 24)]
    parts = MICRO[name]().prepare(net, [(x[c], y[c]) for c in cuts])
    assert len(parts) == 3
    total = 0.0
    for i in range(len(parts)):
        loss = parts.loss(i)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-6)
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-8)


def test_preparing_leaves_the_statistics_alone(net, batch):
    x, y = batch
    parts = MAIL(attack()).prepare(net, [(x[:12], y[:12]), (x[12:], y[12:])])
    assert int(net[1].num_batches_tracked) == 0
    parts.loss(0)
    assert int(net[1].num_batches_tracked) == 1


def test_no_micro_batches(net):
    with pytest.raises(ValueError, match="batches must not be empty"):
        AT(attack()).prepare(net, [])
