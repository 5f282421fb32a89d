"""Properties of all objectives in a plain training loop, and of AT, FAT and GAIRAT."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from objective_parts import attack, friendly, gradients, make_batch, make_net

from pyadv import ops
from pyadv.attacks import APGD
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
    GAIRATWeights,
    Mean,
    Objective,
    Standard,
    clean_cross_entropy,
    fat_mart_tau,
    fat_tau,
    fat_trades_tau,
    gair_fat_tau,
)


def kl(**settings):
    return attack(loss="kl", **settings)


OBJECTIVES = {
    "standard": lambda: Standard(),
    "at": lambda: AT(attack()),
    "fat": lambda: FAT(friendly(omega=0.001), tau=fat_tau),
    "fat-trades": lambda: TRADES(friendly(loss="kl"), tau=fat_trades_tau),
    "fat-mart": lambda: MART(friendly(), tau=fat_mart_tau),
    "trades": lambda: TRADES(kl()),
    "mart": lambda: MART(attack()),
    "mart-exact": lambda: MART(attack(), exact=True, detach_weight=True),
    "mail-at": lambda: MAIL(attack()),
    "mail-at-nat": lambda: MAIL(attack(), margin="nat"),
    "mail-trades": lambda: MAIL(kl(), "trades", margin="dif", slope=2.0, bias=0.0),
    "mail-mart": lambda: MAIL(attack(), "mart", margin="dif_conf", slope=-2.0, bias=0.0),
    "gairat": lambda: GAIRAT(attack()),
    "gair-fat": lambda: GAIRAT(friendly(), lam=0.0, tau=gair_fat_tau),
    "gair-trades": lambda: GAIRTRADES(kl(), weight_on="kl"),
    "gair-trades-both": lambda: GAIRTRADES(kl(), weight_on="both"),
    "gair-mart": lambda: GAIRMART(attack()),
    "gair-rst": lambda: GAIRRST(kl(), attack(loss="margin"), lam=-1.0),
    "awp": lambda: AWP(AT(attack())),
    "trades+awp+emr": lambda: AWP(TRADES(kl()), gamma=0.005) + EMR(0.01),
    "standard+emr": lambda: Standard() + EMR(0.01),
    "at+emr": lambda: AT(attack()) + EMR(0.01, temperature=40.0),
    "at+emr-double": lambda: AT(attack()) + EMR(0.01, derivative="double"),
    "at+emr-difference": lambda: AT(attack()) + EMR(0.01, derivative="difference"),
    "gairat+emr": lambda: GAIRAT(attack()) + EMR(0.01, center=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss(name, net, batch):
    x, y = batch
    objective = OBJECTIVES[name]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = objective(net, x, y, epoch=1)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
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
    expected = {
        **{"standard": 1, "at": 5, "gairat": 5, "mail-at": 5, "mail-at-nat": 6},
        **{"trades": 7, "mart": 6, "mail-trades": 7, "mail-mart": 6, "gair-trades": 7},
        **{"gair-rst": 12, "awp": 6, "at+emr": 6, "at+emr-double": 6, "at+emr-difference": 7},
    }
    for name, passes in expected.items():  # attacks have 4 steps; KL attacks make one more pass
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
    torch.testing.assert_close(loss.detach(), (weights * objective.last["losses"]).mean())


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
        (lambda: Objective(attack(), weighting=len), "weighting must have the methods values"),
        (
            lambda: Objective(None, weighting=GAIRATWeights())(make_net(), *make_batch()),
            "GAIRATWeights needs an attack",
        ),
    ],
)
def test_refuses_the_wrong_attack(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_models(name, net, batch):
    """Run the graphs that torch.compile captures, without its compiler."""
    x, y = batch
    twin = copy.deepcopy(net)
    loss = OBJECTIVES[name]()(twin, x, y)
    compiled = OBJECTIVES[name]()(torch.compile(net, backend="aot_eager"), x, y)
    torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(net, compiled), gradients(twin, loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_epochs_count_from_one(net, batch):
    with pytest.raises(ValueError, match="epoch must be an integer >= 1, got 0"):
        Standard()(net, *batch, epoch=0)


def test_a_term_of_ones_own(net, batch):
    """Bases and regularisers are functions of the step, and share its passes."""
    x, y = batch
    net.eval()
    both = Objective(attack()) + Mean(clean_cross_entropy, lambda epoch: 0.5 * epoch)
    loss = both(net, x, y, epoch=3)
    expected = AT(attack())(net, x, y) + 1.5 * F.cross_entropy(net(x), y)
    torch.testing.assert_close(loss, expected)


def test_any_attack_that_follows_gradients(net, batch):
    objective = GAIRAT(APGD(eps=0.05, steps=3, seed=0))
    assert objective(net, *batch).isfinite()
    assert objective.last["kappa"].max() <= 3


def test_the_old_name_of_terms_warns():
    sys.modules.pop("pyadv.objectives.rows", None)
    with pytest.warns(DeprecationWarning, match="now pyadv.objectives.terms"):
        old = importlib.import_module("pyadv.objectives.rows")
    assert old.Mean is Mean
