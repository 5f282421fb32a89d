"""AT, FAT, GAIRAT and EMR as parts of a plain training loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyadv import ops
from pyadv.attacks import PGD, FriendlyPGD
from pyadv.objectives import AT, EMR, FAT, GAIRAT, Objective, Standard, fat_tau


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@pytest.fixture
def net(device):
    return make_net().to(device)


@pytest.fixture
def batch(device):
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.rand(24, 1, 6, 6, generator=generator)
    y = torch.arange(24) % 4
    for k, (i, j) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):  # class k: a bright corner
        x[y == k, :, i : i + 3, j : j + 3] += 0.4
    return x.to(device), y.to(device)


def attack(**settings):
    return PGD(**{"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0, **settings})


def friendly(**settings):
    return FriendlyPGD(**{"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0, **settings})


OBJECTIVES = {
    "standard": lambda: Standard(),
    "at": lambda: AT(attack()),
    "fat": lambda: FAT(friendly(omega=0.001), tau=fat_tau),
    "gairat": lambda: GAIRAT(attack()),
    "gair-fat": lambda: GAIRAT(friendly(tau=1), lam=0.0),
    "standard+emr": lambda: Standard() + EMR(0.01),
    "at+emr": lambda: AT(attack()) + EMR(0.01, temperature=40.0),
    "gairat+emr": lambda: GAIRAT(attack()) + EMR(0.01, center=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss(name, net, batch):
    x, y = batch
    objective = OBJECTIVES[name]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(net, x, y, epoch=1)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_under_bfloat16_autocast(name, net, batch):
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = OBJECTIVES[name]()(net, x, y)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_at_is_the_mean_cross_entropy_on_the_attack(net, batch):
    x, y = batch
    x_adv = attack().run(x, y, draw=0, model=net).x_adv
    twin = copy.deepcopy(net)
    expected = F.cross_entropy(twin(x_adv), y)
    objective = AT(attack())
    loss = objective(net, x, y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(objective.last["x_adv"], x_adv)
    assert objective.last["logits"] is None  # AT needs no clean forward pass


def test_passes_are_minimal(net, batch):
    x, y = batch
    count = []
    net.register_forward_hook(lambda *_: count.append(1))
    for name, passes in {"standard": 1, "at": 5, "gairat": 5, "at+emr": 6}.items():
        count.clear()
        OBJECTIVES[name]()(net, x, y)
        assert len(count) == passes, name


def test_gairat_weights_the_rows_by_kappa(net, batch):
    x, y = batch
    objective = GAIRAT(attack(), lam=-1.0, begin_epoch=3)
    objective(net, x, y, epoch=2)
    assert objective.last["weights"] is None
    loss = objective(net, x, y, epoch=3, ids=torch.arange(24, device=x.device))
    weights = ops.gairat_weights(objective.last["kappa"], 4, -1.0)
    assert torch.equal(objective.last["weights"], weights)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, device=x.device))
    torch.testing.assert_close(loss.detach(), (weights * objective.last["rows"]).mean())


def test_gairat_with_infinite_lambda_is_at(net, batch):
    x, y = batch
    at = AT(attack())(copy.deepcopy(net), x, y)
    gairat = GAIRAT(attack(), lam=float("inf"))(copy.deepcopy(net), x, y)
    torch.testing.assert_close(at, gairat)


def test_fat_follows_its_schedule(net, batch):
    x, y = batch
    schedule = [fat_tau(e) for e in (1, 50, 51, 90, 91, 120)]
    assert schedule == [0, 0, 1, 1, 2, 2]
    objective = FAT(friendly(), tau=fat_tau)
    objective(net, x, y, epoch=60)
    assert objective.attack.tau == 1


class TestEMR:
    W = [[1.0, -2.0, 0.5], [0.0, 1.0, 1.0], [0.3, -0.4, 2.0]]
    X = [[0.2, 0.1, -0.3], [0.7, 0.4, 0.5]]

    def linear(self, device):
        model = nn.Linear(3, 3, bias=False, device=device, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.tensor(self.W))
        return model

    def batch(self, device):
        x = torch.tensor(self.X, device=device, dtype=torch.float64)
        return x, torch.zeros(2, dtype=torch.int64, device=device)

    @pytest.mark.parametrize("t, r", [(0.1, 1.25089437), (1.0, 0.88268587), (40.0, 0.88199705)])
    def test_closed_form_of_a_linear_model(self, t, r, device):
        """R = 1/B^2 sum_b ||W^T p_b||^2 and dR/dW = 2/B^2 sum_b p_b p_b^T W, p held fixed."""
        model, (x, y) = self.linear(device), self.batch(device)
        base = Standard()(model, x, y)
        penalty = (Standard() + EMR(1.0, t, reduction="official"))(model, x, y) - base
        torch.testing.assert_close(float(penalty.detach()), r, atol=1e-7, rtol=0)
        model.zero_grad()
        penalty.backward()
        p = (model(x) / t).softmax(1).detach()
        torch.testing.assert_close(model.weight.grad, 2 / 4 * p.T @ p @ model.weight.detach())

    def test_does_not_depend_on_the_batch_size(self, net, batch):
        x, y = batch[0].double(), batch[1]
        twice = (torch.cat([x, x]), torch.cat([y, y]))
        net.double().eval()
        objectives = [Standard() + EMR(1.0, reduction=r) for r in ("mean", "official")]
        (mean, mean2), (official, official2) = [
            [float((o(net, *b) - Standard()(net, *b)).detach()) for b in ((x, y), twice)]
            for o in objectives
        ]
        assert mean == pytest.approx(mean2, rel=1e-9)
        assert official == pytest.approx(2 * official2, rel=1e-9)
        assert mean == pytest.approx(24 * official, rel=1e-9)

    def test_grows_with_the_square_of_the_scale(self, device):
        model, (x, y) = self.linear(device), self.batch(device)

        def penalty(temperature):
            total = (Standard() + EMR(1.0, temperature))(model, x, y)
            return float((total - Standard()(model, x, y)).detach())

        one = penalty(1.0)
        with torch.no_grad():
            model.weight *= 3
        assert penalty(3.0) == pytest.approx(9 * one, rel=1e-9)

    def test_centre_ignores_what_is_common_to_all_logits(self, device):
        model, (x, y) = self.linear(device), self.batch(device)
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            shifted.weight += torch.tensor([5.0, -3.0, 1.0], device=device)

        def penalty(m, center):
            total = (Standard() + EMR(1.0, center=center))(m, x, y)
            return float((total - Standard()(m, x, y)).detach())

        assert penalty(model, True) == pytest.approx(penalty(shifted, True), rel=1e-9)
        assert penalty(model, False) != pytest.approx(penalty(shifted, False), rel=1e-2)

    def test_runs_in_eval_mode_and_puts_it_back(self, net, batch):
        x, y = batch
        objective = AT(attack()) + EMR(0.5)
        objective(net, x, y)
        once = net[1].num_batches_tracked.clone()
        assert int(once) == 1  # the training forward pass alone
        assert net.training

    @pytest.mark.slow
    def test_with_a_compiled_model(self, net, batch):
        x, y = batch
        objective = AT(attack()) + EMR(0.5)
        twin = copy.deepcopy(net)
        loss = (AT(attack()) + EMR(0.5))(twin, x, y)
        compiled = objective(torch.compile(net), x, y)
        torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=1e-5)
        compiled.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_composition_leaves_the_parts_alone():
    at = AT(attack())
    total = at + EMR(0.1)
    assert isinstance(total, AT) and len(total.regularisers) == 1 and not at.regularisers
    assert total.state_dict() == {"attack": {"draw": 0}}
    with pytest.raises(TypeError, match="adds regularisers"):
        at + Standard()


def test_resumes_the_attack(net, batch):
    x, y = batch
    first = AT(attack())
    first(net, x, y)
    state = first.state_dict()
    first(net, x, y)
    again = AT(attack())
    again.load_state_dict(state)
    net.eval()
    again(net, x, y)
    assert state == {"attack": {"draw": 1}} and again.attack.draw == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AT(None), "needs an attack"),
        (lambda: GAIRAT(None), "needs an attack"),
        (lambda: FAT(attack()), "FAT needs a FriendlyPGD, got PGD"),
        (lambda: Objective("pgd"), "must be a pyadv attack, got str"),
    ],
)
def test_refuses_the_wrong_attack(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMR(-1.0), "lam must be"),
        (lambda: EMR(1.0, temperature=0.0), "temperature must be > 0"),
        (lambda: EMR(1.0, reduction="sum"), "reduction must be one of mean, official"),
    ],
)
def test_refuses_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_epochs_count_from_one(net, batch):
    with pytest.raises(ValueError, match="epoch counts from 1, got 0"):
        Standard()(net, *batch, epoch=0)
