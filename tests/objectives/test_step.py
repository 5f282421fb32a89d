"""The order within a training step: all attacks once, at the model as it is, then the passes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from objective_parts import attack, friendly, gradients
from objectives.test_objectives import OBJECTIVES, kl
from torch import nn

from pyadv.engine.attack import Attack
from pyadv.objectives import AT, AWP, EMR, GAIRRST, TRADES, Objective, Standard, Step, trades_kl
from pyadv.ops import trades_kl as kl_rows

ORDER = {
    **OBJECTIVES,
    "gair-rst plain": lambda: GAIRRST(kl(), attack(loss="margin"), lam=100.0),
    "gair-rst+awp": lambda: AWP(GAIRRST(kl(), attack(loss="margin"), lam=-1.0), gamma=0.05),
    "gair-rst+emr": lambda: GAIRRST(kl(), attack(loss="margin"), lam=-1.0) + EMR(0.01),
    "fat-trades+awp": lambda: AWP(TRADES(friendly(loss="kl"), tau=1)),
}


def record(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict], Counter]:
    """Record each forward pass of `net`, and count the runs of each attack."""
    passes: list[dict] = []
    runs: Counter = Counter()
    running = []

    def before(module, inputs):
        state = {name: t.detach().clone() for name, t in module.named_buffers()}
        state |= {"0.weight": module[0].weight.detach().clone()}
        modes = {m.training for m in module.modules()}
        passes.append({"attack": bool(running), "modes": modes, "state": state})

    perturb = Attack.perturb

    def counted(self, *args, **kwargs):
        runs[self] += 1
        running.append(self)
        try:
            return perturb(self, *args, **kwargs)
        finally:
            running.pop()

    net.register_forward_pre_hook(before)
    monkeypatch.setattr(Attack, "perturb", counted)
    return passes, runs


@pytest.mark.parametrize("name", ORDER)
def test_attacks_run_once_and_before_any_pass_in_train_mode(name, net, batch, monkeypatch):
    objective = ORDER[name]()
    attacks = objective.attacks(epoch=1)
    before = {n: b.clone() for n, b in net.named_buffers()}
    before |= {"0.weight": net[0].weight.detach().clone()}
    passes, runs = record(net, monkeypatch)
    objective(net, *batch)

    assert runs == Counter(attacks)
    assert all(a.draw == 1 for a in attacks)
    kinds = [p["attack"] for p in passes]
    assert kinds == sorted(kinds, reverse=True), "an attack ran after another forward pass"
    for p in passes:
        if p["attack"]:
            assert p["modes"] == {False}
            for key, value in before.items():
                assert torch.equal(p["state"][key], value), key
    expected = 0 if name.startswith("standard") else 2 if "gair-rst" in name else 1
    assert len(attacks) == (1 if name == "gair-rst plain" else expected)
    assert any(p["modes"] == {True} for p in passes)


@pytest.mark.parametrize("name", ["gair-rst", "awp", "fat-trades"])
def test_micro_batches_share_a_draw_of_each_attack(name, net, batch, monkeypatch):
    x, y = batch
    objective = ORDER[name]()
    passes, runs = record(net, monkeypatch)
    parts = objective.prepare(net, [(x[:9], y[:9]), (x[9:], y[9:])])
    assert all(p["attack"] for p in passes)
    for i in range(len(parts)):
        parts.loss(i).backward()
    assert all(runs[a] == 2 and a.draw == 1 for a in objective.attacks(1))


def test_gair_rst_in_micro_batches_is_the_whole_batch(net, batch):
    x, y = batch[0].double(), batch[1]
    net = net.double().eval()
    make = OBJECTIVES["gair-rst"]
    expected = make()(net, x, y)
    grads = gradients(net, expected)
    parts = make().prepare(net, [(x[:9], y[:9]), (x[9:], y[9:])])
    total = 0.0
    for i in range(2):
        loss = parts.loss(i)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), rel=1e-9)
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)


class LateAttack:
    """A base that runs an attack it has not declared, after a forward pass."""

    def __init__(self):
        self.attack = attack(loss="margin")

    def __call__(self, step):
        losses = F.cross_entropy(step.logits, step.y, reduction="none")
        step.perturb(self.attack)
        return losses


def test_an_undeclared_attack_after_a_pass_is_refused(net, batch):
    with pytest.raises(RuntimeError, match=r"before the first forward pass.*attacks\(epoch\)"):
        Objective(None, LateAttack())(net, *batch)


def test_a_declared_attack_of_a_regulariser(net, batch):
    """The worked case: a second divergence, at the examples of another attack."""

    class MarginKL:
        def __init__(self, margin_attack):
            self.margin_attack = margin_attack

        def attacks(self, epoch):
            return () if epoch < 2 else (self.margin_attack,)

        def __call__(self, step):
            if step.epoch < 2:
                return step.logits.new_zeros(())
            x_margin = step.perturb(self.margin_attack).x_adv
            return kl_rows(step.forward(x_margin), step.logits).mean()

    x, y = batch
    net = net.eval()
    objective = TRADES(kl()) + MarginKL(attack(loss="margin"))
    assert len(objective.attacks(1)) == 1 and len(objective.attacks(2)) == 2
    x_margin = attack(loss="margin").perturb(x, y, draw=0, model=net).x_adv
    expected = TRADES(kl())(net, x, y, epoch=2) + kl_rows(net(x_margin), net(x)).mean()
    torch.testing.assert_close(objective(net, x, y, epoch=2), expected)


class TestUnlabelled:
    """Samples without a label are attacked away from the network's natural prediction."""

    @pytest.fixture
    def net(self, net, batch):
        """With decisions of its own: a few steps of training."""
        optimizer = torch.optim.SGD(net.parameters(), 0.3)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
        return net

    def half(self, batch):
        x, y = batch
        y = y.clone()
        y[12:] = -1
        return x, y

    @pytest.mark.parametrize(
        "make",
        [
            lambda: friendly(loss="kl", tau=1, omega=0.001),
            lambda: attack(loss="kl", best="fooled"),
            lambda: attack(loss="kl", restarts=3),
        ],
        ids=["friendly", "fooled", "restarts"],
    )
    def test_judged_by_the_natural_prediction(self, make, net, batch):
        x, y = self.half(batch)
        with torch.no_grad():
            natural = copy.deepcopy(net).eval()(x).argmax(1)
        assert len(natural[12:].unique()) > 1
        expected = make().perturb(x, y.where(y >= 0, natural), draw=0, model=net)
        objective = TRADES(make(), ignore_index=-1)
        objective(net, x, y)
        assert torch.equal(objective.last["x_adv"], expected.x_adv)
        assert torch.equal(objective.last["kappa"][:12], expected.kappa[:12])

    def test_are_not_released_at_the_start(self, net, batch):
        """A network that predicts class 0 nowhere: as class 0 every sample would be released."""
        x, y = self.half(batch)
        with torch.no_grad():
            net[-1].bias[0] = -50.0
        objective = TRADES(friendly(loss="kl", tau=0, start="normal_small"), ignore_index=-1)
        objective(net, x, y)
        moved = (objective.last["x_adv"] - x).abs().amax((1, 2, 3))
        assert float(moved[12:].min()) > 0.015  # more than the noise of the start

    def test_a_plain_kl_attack_needs_no_prediction(self, net, batch):
        passes = []
        net.register_forward_hook(lambda *_: passes.append(1))
        TRADES(kl(), ignore_index=-1)(net, *self.half(batch))
        assert len(passes) == 7


class TestLabels:
    @pytest.mark.parametrize("name", ORDER)
    @pytest.mark.parametrize("bad", [4, 2**40, -1, -7])
    def test_out_of_range(self, name, bad, net, batch):
        x, y = batch
        y = y.clone()
        y[5] = bad
        objective = ORDER[name]()
        if objective.ignore_index == bad:
            return
        passes = []
        net.register_forward_hook(lambda *_: passes.append(1))
        with pytest.raises(ValueError, match=f"y must hold labels.*(to {bad}|from {bad})"):
            objective(net, x, y)
        assert len(passes) <= (2 if bad > 0 else 0)
        assert all(p.grad is None for p in net.parameters()) and net.training

    def test_of_the_wrong_kind(self, net, batch):
        x, y = batch
        for labels, error, message in (
            (y.int(), TypeError, "y must be an int64 tensor, got torch.int32"),
            (y.tolist(), TypeError, "y must be a tensor, got list"),
            (y[:5], ValueError, r"y must have shape \[24\], one label per sample of x, got \[5\]"),
            (y[:, None], ValueError, r"got \[24, 1\]"),
        ):
            with pytest.raises(error, match=message):
                Standard()(net, x, labels)

    def test_soft_labels(self, net, batch):
        x, y = batch
        soft = 0.9 * F.one_hot(y, 4) + 0.025
        net.eval()
        loss = Standard()(net, x, soft)
        torch.testing.assert_close(loss, F.cross_entropy(net(x), soft))


def test_a_step_shares_its_passes(net, batch):
    step = Step(net, *batch, epoch=1, attack=kl())
    passes = []
    step.perturb(step.attack)
    net.register_forward_hook(lambda *_: passes.append(1))
    trades_kl(step)
    trades_kl(step)
    assert len(passes) == 2 and step.made("logits") is step.logits
    again = step.again()
    assert again.perturbed is step.perturbed and again.made("logits") is None
    assert AT(attack())(net, *batch).isfinite()
