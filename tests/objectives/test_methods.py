"""TRADES, MART, MAIL, GAIRAT and their variants against their formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from objective_parts import attack, friendly, gradients

from pyadv.objectives import (
    AT,
    AWP,
    EMR,
    FAT,
    GAIRAT,
    GAIRMART,
    GAIRRST,
    GAIRTRADES,
    MAIL,
    MART,
    TRADES,
    Linear,
    Piecewise,
    fat_mart_tau,
    fat_trades_tau,
    gair_fat_tau,
)


def kl_attack(**settings):
    return attack(loss="kl", **settings)


@pytest.fixture
def net(net):
    return net.double()


@pytest.fixture
def batch(batch):
    return batch[0].double(), batch[1]


class Outputs:
    """Logits with gradients, and the terms of the papers, one value per sample."""

    def __init__(self, net, x, x_adv, y):
        self.z, self.z_adv, self.y = net(x), net(x_adv), y
        q, p = self.z.softmax(1), self.z_adv.softmax(1)
        self.ce = F.cross_entropy(self.z, y, reduction="none")
        self.ce_adv = F.cross_entropy(self.z_adv, y, reduction="none")
        self.kl = (q * (q.log() - p.log())).sum(1)
        other = p.scatter(1, y[:, None], 0.0).amax(1)
        self.margin = (p.gather(1, y[:, None])[:, 0] - other).detach()
        self.bce = self.ce_adv - (1.0001 - other + 1e-12).log()
        wrong = 1.0000001 - q.gather(1, y[:, None])[:, 0]
        self.mart_kl = wrong * (q * (q.log() - (p + 1e-12).log())).sum(1)


def mean_one(w):
    return w * len(w) / w.sum()


def gair(kappa, lam=-1.0, steps=4):
    return (1 + torch.tanh(lam + 5 * (1 - 2 * kappa.double() / steps))) / 2


def mail(o, slope=10.0, bias=-0.5):
    return mean_one(torch.sigmoid(-slope * (o.margin - bias)))


FORMULAS = {
    "trades": (lambda: TRADES(kl_attack(), 6.0), lambda o, k: o.ce.mean() + 6 * o.kl.mean()),
    "fat-trades": (
        lambda: TRADES(friendly(loss="kl"), 6.0, tau=fat_trades_tau),
        lambda o, k: o.ce.mean() + 6 * o.kl.mean(),
    ),
    "mart": (lambda: MART(attack(), 5.0), lambda o, k: o.bce.mean() + 5 * o.mart_kl.mean()),
    "fat-mart": (
        lambda: MART(friendly(), 5.0, tau=fat_mart_tau),
        lambda o, k: o.bce.mean() + 5 * o.mart_kl.mean(),
    ),
    "mail-at": (lambda: MAIL(attack()), lambda o, k: (mail(o) * o.ce_adv).mean()),
    "mail-at x3": (
        lambda: MAIL(attack(), normalize="x3"),
        lambda o, k: (3 * torch.sigmoid(-10 * (o.margin + 0.5)) * o.ce_adv).mean(),
    ),
    "mail-trades": (
        lambda: MAIL(kl_attack(), "trades", slope=2.0, bias=0.0, beta=5.0),
        lambda o, k: o.ce.mean() + 5 * (mail(o, 2.0, 0.0) * o.kl).mean(),
    ),
    "mail-mart": (
        lambda: MAIL(attack(), "mart", slope=5.0, bias=0.05, beta=5.0),
        lambda o, k: (mail(o, 5.0, 0.05) * o.bce).mean() + 5 * o.mart_kl.mean(),
    ),
    "gairat": (lambda: GAIRAT(attack()), lambda o, k: (mean_one(gair(k)) * o.ce_adv).mean()),
    "gair-fat": (
        lambda: GAIRAT(friendly(), 0.0, tau=gair_fat_tau),
        lambda o, k: (mean_one(gair(k, 0.0)) * o.ce_adv).mean(),
    ),
    "gair-trades kl": (
        lambda: GAIRTRADES(kl_attack(), 6.0, "kl"),
        lambda o, k: o.ce.mean() + 6 * (mean_one(gair(k)) * o.kl).mean(),
    ),
    "gair-trades ce": (
        lambda: GAIRTRADES(kl_attack(), 6.0, "ce"),
        lambda o, k: (mean_one(gair(k)) * o.ce).mean() + 6 * o.kl.mean(),
    ),
    "gair-trades both": (
        lambda: GAIRTRADES(kl_attack(), 6.0, "both"),
        lambda o, k: (mean_one(gair(k)) * (o.ce + 6 * o.kl)).mean(),
    ),
    "gair-mart": (
        lambda: GAIRMART(attack(), 5.0),
        lambda o, k: (mean_one(gair(k)) * o.bce).mean() + 5 * o.mart_kl.mean(),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_those_of_the_formula(name, net, batch):
    make, formula = FORMULAS[name]
    x, y = batch
    objective = make()
    loss = objective(net, x, y)
    last = objective.last
    expected = formula(Outputs(net, x, last["x_adv"], y), last["kappa"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # weights are float32
    for a, b in zip(gradients(net, loss), gradients(net, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("margin", ["nat", "adv", "dif", "dif_conf"])
def test_mail_has_four_margins(margin, net, batch):
    x, y = batch
    objective = MAIL(attack(), margin=margin, slope=3.0, bias=0.1)
    objective(net, x, y)
    last = objective.last
    z = net(x) if last["logits"] is None else last["logits"]
    p, p_adv = z.softmax(1), last["logits_adv"].softmax(1)
    p_y, q_y = (t.gather(1, y[:, None])[:, 0] for t in (p, p_adv))
    p_m, q_m = (t.scatter(1, y[:, None], 0.0).amax(1) for t in (p, p_adv))
    value = {"nat": p_y - p_m, "adv": q_y - q_m, "dif": p_y - q_m, "dif_conf": p_y - q_y}[margin]
    expected = mean_one(torch.sigmoid(-3.0 * (value - 0.1))).detach()
    torch.testing.assert_close(last["weights"], expected)


def test_trades_without_a_perturbation_is_cross_entropy(net, batch):
    """KL and its gradient are 0 at x_adv = x, also with batch statistics."""
    x, y = batch
    loss = TRADES(kl_attack(eps=0.0))(net, x, y)
    expected = F.cross_entropy(net(x), y)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(gradients(net, loss), gradients(net, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


def test_infinite_lambda_takes_the_weights_away(net, batch):
    x, y = batch
    net.eval()
    for weighted, plain in (
        (GAIRTRADES(kl_attack(), lam=math.inf), TRADES(kl_attack())),
        (GAIRMART(attack(), lam=math.inf), MART(attack())),
        (GAIRAT(attack(), begin_epoch=2), AT(attack())),
        (MAIL(attack(), "mart", begin_epoch=2), MART(attack())),
    ):
        torch.testing.assert_close(weighted(net, x, y), plain(net, x, y))


@pytest.mark.parametrize("lam", [-math.inf, -300.0, -20.0, 0.0, math.inf])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "discrete"])
def test_gairat_is_finite_for_every_lambda_and_length(lam, steps, kind, net, batch):
    x, y = batch
    objective = GAIRAT(attack(steps=steps), lam=lam, kind=kind)
    assert objective(net, x, y).isfinite()
    assert objective.last["weights"].sum() == pytest.approx(len(x), rel=1e-5)


class TestGAIRRST:
    def objective(self, lam=-1.0):
        return GAIRRST(kl_attack(), attack(loss="margin"), beta=6.0, lam=lam)

    def test_mixes_two_divergences(self, net, batch):
        x, y = batch
        net.eval()
        objective = self.objective()
        loss = objective(net, x, y)
        o = Outputs(net, x, objective.last["x_adv"], y)
        x_margin = attack(loss="margin").perturb(x, y, draw=0, model=net).x_adv
        margin_kl = Outputs(net, x, x_margin, y).kl
        w = (1 + torch.tanh(-1.0 + 2 - objective.last["kappa"].double())) / 2
        expected = o.ce.mean() + 6 * (w * o.kl + (1 - w) * margin_kl).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        assert float(w.max()) > 0.5 > float(w.min())

    def test_samples_without_a_label_count_in_the_divergence_alone(self, net, batch):
        x, y = batch
        net.eval()
        half = y.clone()
        half[12:] = -1
        objective = self.objective()
        loss = objective(net, x, half)
        kappa = objective.last["kappa"]
        assert int(kappa[12:].abs().sum()) == 0 and int(kappa[:12].sum()) > 0
        o = Outputs(net, x, objective.last["x_adv"], y)
        rest = loss - o.ce[:12].sum() / 24
        torch.testing.assert_close(
            objective.last["losses"][12:], 6 * o.kl[12:].detach(), rtol=1e-6, atol=1e-9
        )
        torch.testing.assert_close(rest.detach(), objective.last["losses"].mean())

    def test_large_lambda_is_trades(self, net, batch):
        x, y = batch
        y = y.clone()
        y[::2] = -1
        net.eval()
        schedule = Piecewise(100.0, {2: 3.0})
        trades = TRADES(kl_attack(), ignore_index=-1)(net, x, y)
        torch.testing.assert_close(self.objective(schedule)(net, x, y), trades)

    def test_remembers_both_attacks(self, net, batch):
        objective = self.objective()
        objective(net, *batch)
        assert objective.state_dict() == {"attack": {"draw": 1}, "base": {"draw": 1}}
        again = self.objective()
        again.load_state_dict(objective.state_dict())
        net.eval()
        torch.testing.assert_close(again(net, *batch), objective(net, *batch))


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, (make, _) in FORMULAS.items()),
        pytest.param(lambda: AWP(TRADES(kl_attack())), id="awp"),
        pytest.param(lambda: AT(attack()) + EMR(1.0), id="emr"),
        pytest.param(lambda: GAIRRST(kl_attack(), attack(loss="margin"), lam=-1.0), id="gair-rst"),
    ],
)
def test_a_doubled_batch_has_the_same_loss_and_gradient(make, net, batch):
    x, y = batch
    twin = copy.deepcopy(net)  # with its own running statistics
    once = make()(net, x, y)
    first = gradients(net, once)
    twice = make()(twin, torch.cat([x, x]), torch.cat([y, y]))
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-9)
    for a, b in zip(first, gradients(twin, twice), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_tau_follows_the_official_schedules():
    changes = {
        fat_trades_tau: {1: 0, 30: 0, 31: 1, 50: 1, 51: 2, 70: 2, 71: 3, 85: 3},
        fat_mart_tau: {20: 0, 21: 1, 40: 1, 41: 2, 60: 2, 61: 3, 80: 3, 81: 4},
        gair_fat_tau: {40: 0, 41: 3, 70: 3, 71: 6, 120: 6},
    }
    for schedule, values in changes.items():
        assert {e: schedule(e) for e in values} == values


def test_objectives_can_be_pickled(net, batch):
    """Spawned processes receive them pickled."""
    for make, _ in FORMULAS.values():
        again = pickle.loads(pickle.dumps(make()))
        assert again.state_dict() == make().state_dict()


def test_tau_is_set_before_the_attack(net, batch):
    objective = TRADES(friendly(loss="kl"), tau=fat_trades_tau)
    objective(net, *batch, epoch=60)
    assert objective.attack.tau == 2


def test_schedules_of_lambda():
    lam = Piecewise(math.inf, {60: -1.0, 90: -2.0, 110: -2.5})
    assert [lam(e) for e in (1, 59, 60, 90, 109, 110)] == [math.inf, math.inf, -1, -2, -2, -2.5]
    lam = Linear(3.0, -1.0, first=60, last=120)
    assert [lam(e) for e in (1, 60, 75, 120, 130)] == [3.0, 3.0, 2.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="must be finite, got inf"):
        Linear(math.inf, -1.0, 60, 120)
    with pytest.raises(ValueError, match="first must be < last"):
        Linear(3.0, -1.0, 60, 60)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: TRADES(attack()), ValueError, 'needs an attack with loss="kl"'),
        (lambda: TRADES(None), TypeError, "needs an attack, got None"),
        (lambda: MART(None), TypeError, "needs an attack, got None"),
        (lambda: MAIL(attack(), "trades"), ValueError, 'needs an attack with loss="kl"'),
        (lambda: MAIL(attack(), "mae"), ValueError, "base must be one of at, trades, mart"),
        (lambda: MAIL(attack(), margin="x"), ValueError, "margin must be one of nat, adv"),
        (lambda: GAIRTRADES(kl_attack(), weight_on="x"), ValueError, "weight_on must be one of"),
        (lambda: GAIRTRADES(attack()), ValueError, 'needs an attack with loss="kl"'),
        (lambda: TRADES(kl_attack(), tau=1), TypeError, "tau is for a FriendlyPGD, got PGD"),
        (lambda: FAT(attack()), TypeError, "FAT needs a FriendlyPGD"),
        (
            lambda: TRADES(attack(), any_attack=True, ignore_index=-1),
            ValueError,
            'ignore_index needs an attack with loss="kl"',
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_any_attack_on_request(net, batch):
    assert TRADES(attack(), any_attack=True)(net, *batch).isfinite()
