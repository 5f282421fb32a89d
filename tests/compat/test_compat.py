"""The official functions from the same seeds: values, gradients, iterates, generators and running
statistics, in float64 end to end."""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_parts import gradients, make_batch, make_net
from torch.utils.data import DataLoader, TensorDataset

from pyadv.compat import emr, fat, gairat, mail, mart, trades

_spec = importlib.util.spec_from_file_location("oracles", Path(__file__).parent / "oracles.py")
official = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(official)

ALPHA, EPS, STEPS = 0.02, 0.05, 5


@pytest.fixture
def net():
    """A network trained for a few steps, so that an attack can change its decisions."""
    net = make_net().double()
    x, y = make_batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x.double()), y).backward()
        optimizer.step()
    net.zero_grad()
    return net


@pytest.fixture
def batch():
    x, y = make_batch(20)
    return x.double(), y


def from_seed(function):
    """Return the result of a function from a fixed seed, and the generators' next numbers."""
    torch.manual_seed(3)
    np.random.seed(3)
    result = function()
    return result, torch.rand(3), np.random.rand(3)


def assert_same(ours, theirs):
    (a, torch_a, numpy_a), (b, torch_b, numpy_b) = from_seed(ours), from_seed(theirs)
    assert torch.equal(torch_a, torch_b), "torch's generator was used otherwise"
    assert np.array_equal(numpy_a, numpy_b), "NumPy's generator was used otherwise"
    return a, b


def assert_same_training(ours, theirs, net, statistics=True, steps=3):
    """Check that `steps` SGD steps on each loss lead to the same network."""
    optimizers = []

    def train(loss, model):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        optimizers.append(optimizer)
        losses = []
        for _ in range(steps):
            value = loss(model, optimizer)
            optimizer.zero_grad() if loss is theirs else None
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        assert all(m.training for m in model.modules())
        return torch.stack(losses)

    one, two = copy.deepcopy(net).eval(), copy.deepcopy(net).eval()
    a, b = assert_same(lambda: train(ours, one), lambda: train(theirs, two))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for (name, p), q in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        if statistics or "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("distance", ["l_inf", "l_2", "none"])
def test_trades(distance, net, batch):
    assert_same_training(
        lambda model, optimizer: trades.trades_loss(
            model, *batch, optimizer, ALPHA, EPS, STEPS, 6.0, distance
        ),
        lambda model, _: official.trades(model, *batch, ALPHA, EPS, STEPS, 6.0, distance),
        net,
    )


def test_trades_with_dropout(net, batch):
    """The KL term has its own clean pass, with its own dropout mask."""
    net = torch.nn.Sequential(*net[:-1], torch.nn.Dropout(0.3), net[-1])
    assert_same_training(
        lambda model, optimizer: trades.trades_loss(
            model, *batch, optimizer, ALPHA, EPS, STEPS, 6.0
        ),
        lambda model, _: official.trades(model, *batch, ALPHA, EPS, STEPS, 6.0),
        net,
    )


def test_trades_in_fewer_passes(net, batch):
    """One step has the same value and gradient; running statistics get one update less."""
    x, y = batch
    trades_loss = partial(trades.trades_loss, official_passes=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    twin = copy.deepcopy(net)
    a, b = assert_same(
        lambda: trades_loss(net, x, y, optimizer, ALPHA, EPS, STEPS, 6.0),
        lambda: official.trades(twin, x, y, ALPHA, EPS, STEPS, 6.0),
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    for g, h in zip(gradients(net, a), gradients(twin, b), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-7, atol=1e-10)
    assert int(twin[1].num_batches_tracked - net[1].num_batches_tracked) == 1
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    trades_loss(net, x, y, optimizer, ALPHA, EPS, STEPS, 6.0)
    assert len(passes) == STEPS + 3


def test_l2_gradients_of_zero_are_replaced_by_noise(batch):
    """A network that is constant on some samples."""
    x, y = batch
    x = x.clone()
    x[3] = 0.0

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(36, 4).double()

        def forward(self, x):
            return self.linear((x.flatten(1) - 0.3).clamp_min(0))

    net = Masked()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    a, b = assert_same(
        lambda: trades.trades_loss(net, x, y, optimizer, ALPHA, 0.3, STEPS, 6.0, "l_2"),
        lambda: official.trades(net, x, y, ALPHA, 0.3, STEPS, 6.0, "l_2"),
    )
    assert a.isfinite()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("distance", ["l_inf", "none"])
def test_mart(distance, net, batch):
    assert_same_training(
        lambda model, optimizer: mart.mart_loss(
            model, *batch, optimizer, ALPHA, EPS, STEPS, 5.0, distance
        ),
        lambda model, _: official.mart(model, *batch, ALPHA, EPS, STEPS, 5.0, distance),
        net,
    )


@pytest.mark.parametrize("method", ["mart", "trades", "at"])
def test_mail(method, net, batch):
    bias, slope = -0.07, 5.0
    assert_same_training(
        lambda model, optimizer: mail.mail_loss(
            model, *batch, optimizer, bias, slope, ALPHA, EPS, STEPS, 5.0, method="mail_" + method
        ),
        lambda model, _: official.mail(model, *batch, bias, slope, ALPHA, EPS, STEPS, 5.0, method),
        net,
    )


def test_mail_pieces(net, batch):
    logits, y = net(batch[0]).detach(), batch[1]
    torch.testing.assert_close(mail.PM(logits, y), official.pm(logits, y))
    expected = 3 * torch.sigmoid((official.pm(logits, y) - 0.5) * 10)
    torch.testing.assert_close(mail.weight_assign(logits, y, -0.5, 10.0), expected)
    many = torch.randn(5, 100)  # the official code assumes ten classes
    assert mail.PM(many, torch.arange(5)).shape == (5,)
    with pytest.raises(RuntimeError, match="invalid method name: 'sgd'"):
        mail.mail_loss(net, *batch, torch.optim.SGD(net.parameters(), 0.1), 0, 1, method="sgd")


@pytest.mark.parametrize("func", ["Tanh", "Sigmoid", "Discrete"])
@pytest.mark.parametrize("steps", [2, 7, 10])
def test_gair(func, steps):
    kappa = torch.arange(steps + 1).float()
    expected = official.gair(steps, kappa, -1.0, func)
    torch.testing.assert_close(gairat.GAIR(steps, kappa, -1.0, func), expected)


def test_gair_where_the_official_code_divides_by_zero():
    kappa = torch.tensor([0.0, 1.0, 1.0])
    assert gairat.GAIR(1, kappa, 0.0, "Tanh").isfinite().all()
    assert torch.equal(gairat.GAIR(10, 10 + 0 * kappa, -400.0, "Tanh"), torch.ones(3))


@pytest.mark.parametrize("loss_fn", ["cent", "cw", "kl"])
@pytest.mark.parametrize(
    "category, rand_init", [("Madry", True), ("trades", True), ("Madry", False)]
)
def test_ga_pgd(loss_fn, category, rand_init, net, batch):
    args = (*batch, EPS, ALPHA, STEPS, loss_fn, category, rand_init)
    if loss_fn == "kl" and not rand_init:
        with pytest.raises(ValueError, match='loss="kl" needs a start'):
            gairat.GA_PGD(net, *args)
        return
    (x_adv, kappa), (expected, count) = assert_same(
        lambda: gairat.GA_PGD(net, *args), lambda: official.ga_pgd(net, *args)
    )
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    assert torch.equal(kappa, count) and not net.training
    assert len(kappa.unique()) > 1 and all(p.grad is None for p in net.parameters())


def test_cwloss(net, batch):
    logits = net(batch[0]) - 100.0  # all negative
    torch.testing.assert_close(gairat.cwloss(logits, batch[1]), official.cw(logits, batch[1]))


def test_evaluation_of_gairat(net, batch):
    """Means over the data set, whose last batch may be smaller."""
    loader = DataLoader(TensorDataset(*batch), batch_size=8)
    x, y = batch
    (loss, accuracy), _ = assert_same(lambda: gairat.eval_clean(net, loader), lambda: list(loader))
    z = net.eval()(x)
    assert loss == pytest.approx(float(F.cross_entropy(z, y).detach()), rel=1e-9)
    assert accuracy == float((z.argmax(1) == y).double().mean()) and isinstance(loss, float)

    def theirs():
        found = [official.ga_pgd(net, *b, EPS, ALPHA, 3, "cw", "Madry", True) for b in loader]
        return net(torch.cat([x_adv for x_adv, _ in found])).detach()

    net.train()
    args = {"perturb_steps": 3, "epsilon": EPS, "step_size": ALPHA, "loss_fn": "cw"}
    (loss, accuracy), z = assert_same(
        lambda: gairat.eval_robust(net, loader, **args, category="Madry", random=True), theirs
    )
    assert loss == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-9)
    assert accuracy == float((z.argmax(1) == y).double().mean()) and not net.training
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("omega", [0, 0.01])
@pytest.mark.parametrize("tau", [0, 1, STEPS])
@pytest.mark.parametrize("loss_fn", ["cent", "kl"])
@pytest.mark.parametrize("kind", ["uniform_randominit", "normal_distribution_randominit"])
def test_earlystop(kind, loss_fn, tau, omega, net, batch):
    x, y = batch

    def theirs():
        start = official.numpy_noise(x, EPS) if "uniform" in kind else official.small_noise(x)
        start = start.clamp(0, 1)
        return official.earlystop(net, x, y, ALPHA, EPS, STEPS, tau, start, loss_fn, omega)[:4]

    args = (net, x, y, ALPHA, EPS, STEPS, tau, kind, loss_fn, True, omega)
    ours, expected = assert_same(lambda: fat.earlystop(*args), theirs)
    for a, b in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert ours[3] == expected[3]
    if tau == 0:
        assert not torch.equal(ours[2], x)  # some were released early
    (x_adv, target, data, _), _ = assert_same(
        lambda: fat.earlystop(*args, original_order=True), theirs
    )
    assert torch.equal(target, y) and torch.equal(data, x)
    assert torch.equal(x_adv.sum((1, 2, 3)).sort()[0], ours[0].sum((1, 2, 3)).sort()[0])


def test_earlystop_of_one_sample(net, batch):
    """The official code returns a 0-dim target here."""
    x_adv, target, data, _ = fat.earlystop(
        net, batch[0][:1], batch[1][:1], ALPHA, EPS, STEPS, 0, "uniform_randominit", "cent"
    )
    assert x_adv.shape == data.shape == (1, 1, 6, 6) and target.shape == (1,)


@pytest.mark.parametrize("tau", [0, 2])
@pytest.mark.parametrize("kind", ["fat", "fat_for_trades"])
def test_ga_earlystop(kind, tau, net, batch):
    """Against FAT's loop, which compares each sample with its own label."""
    x, y = batch
    loss_fn = "kl" if kind == "fat_for_trades" else "cent"

    def theirs():
        if kind == "fat_for_trades":
            official.small_noise(x)
        start = official.numpy_noise(x, EPS)
        return official.earlystop(net, x, y, ALPHA, EPS, STEPS, tau, start, loss_fn, 0.0)

    args = (net, x, y, ALPHA, EPS, STEPS, tau, kind, True, 0.0)
    ours, expected = assert_same(lambda: gairat.GA_earlystop(*args), theirs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.equal(gairat.GA_earlystop(*args, original_order=True)[1], y)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0])
def test_emr(temperature, net, batch):
    x = batch[0]
    twin = copy.deepcopy(net).eval()
    a, b = emr.emr_penalty(net, x, temperature), official.emr(twin, x, temperature)
    torch.testing.assert_close(a, b)
    assert net.training
    grads, expected = (
        torch.autograd.grad(r, list(n.parameters()), allow_unused=True, materialize_grads=True)
        for r, n in ((a, net), (b, twin))
    )
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("name", ["trades", "mart", "mail"])
def test_float32_loss_at_the_same_examples(name, net, batch):
    net = net.float()
    x, y = batch[0].float(), batch[1]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    args = (ALPHA, EPS, 0)  # no steps: x_adv is the start in both
    ours, theirs = {
        "trades": (
            lambda: trades.trades_loss(net, x, y, optimizer, *args, 6.0),
            lambda: official.trades(net, x, y, *args, 6.0),
        ),
        "mart": (
            lambda: mart.mart_loss(net, x, y, optimizer, *args, 5.0),
            lambda: official.mart(net, x, y, *args, 5.0),
        ),
        "mail": (
            lambda: mail.mail_loss(net, x, y, optimizer, -0.5, 10.0, *args, 5.0),
            lambda: official.mail(net, x, y, -0.5, 10.0, *args, 5.0, "mart"),
        ),
    }[name]
    a, b = assert_same(ours, theirs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n, b: gairat.GA_PGD(n, *b, EPS, ALPHA, 2, "ce", "Madry", True), "loss_fn must be"),
        (lambda n, b: gairat.GA_PGD(n, *b, EPS, ALPHA, 2, "cw", "mad", True), "category must be"),
        (
            lambda n, b: gairat.GA_earlystop(n, *b, ALPHA, EPS, 2, 0, "at", True, 0.0),
            "type must be one of fat, fat_for_mart, fat_for_trades, got 'at'",
        ),
        (
            lambda n, b: fat.earlystop(n, *b, ALPHA, EPS, 2, 0, "uniform", "cent"),
            "randominit_type must be",
        ),
        (lambda n, b: gairat.GAIR(4, torch.zeros(2), 0.0, "Linear"), "kind must be one of"),
    ],
)
def test_refuses(call, message, net, batch):
    with pytest.raises(ValueError, match=message):
        call(net, batch)
