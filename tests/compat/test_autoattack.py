"""Scripts written for the authors' AutoAttack, and its verdicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyadv import data
from pyadv.attacks import PGD, Parity
from pyadv.compat.autoattack import AutoAttack
from pyadv.compat.torchattacks import AutoAttack as TorchAttacksAutoAttack


@pytest.fixture(scope="module")
def trained():
    """Return a network trained adversarially until somewhat robust, and images new to it."""
    torch.manual_seed(0)
    images = data.load("fashion-mini")
    net = nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    attack = PGD(net, eps=0.1, alpha=0.05, steps=4, seed=0)
    for i in range(0, 4000, 100):
        x, y = images.train_x[i : i + 100], images.train_y[i : i + 100]
        loss = nn.functional.cross_entropy(net(attack(x, y)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), images.test_x[:40], images.test_y[:40]


def quick(attack):
    attack.square.n_queries, attack.fab.n_iter = 300, 20
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = 20
    return attack


def test_a_script(trained, capsys, tmp_path):
    net, x, y = trained
    adversary = quick(
        AutoAttack(net, norm="Linf", eps=0.1, version="standard", log_path=tmp_path / "log.txt")
    )
    adversary.apgd.n_restarts = 2
    adversary.seed = 0
    assert adversary._native().members(10)["apgd-ce"].restarts == 2
    x_adv, labels = adversary.run_standard_evaluation(x, y, bs=32, return_labels=True)
    assert torch.equal(net(x_adv).argmax(1), labels) and (x_adv - x).abs().max() <= 0.1 + 1e-6
    clean, robust = adversary.clean_accuracy(x, y, bs=32), adversary.clean_accuracy(x_adv, y)
    assert 0 < robust < clean and robust == (labels == y).double().mean()
    assert "square" in capsys.readouterr().err and "apgd-t" in (tmp_path / "log.txt").read_text()

    adversary.attacks_to_run = ["apgd-ce", "square"]
    alone = adversary.run_standard_evaluation_individual(x, y, bs=50)
    assert list(alone) == adversary.attacks_to_run == ["apgd-ce", "square"]
    assert adversary.clean_accuracy(alone["square"], y) >= robust


def test_custom_and_refusals(trained):
    net, x, y = trained
    custom = AutoAttack(
        net, eps=0.1, version="custom", attacks_to_run=["apgd-dlr", "fab-t"], verbose=False, seed=0
    )
    members = quick(custom)._native().members(10)
    assert list(members) == ["apgd-dlr", "fab-t"]
    assert members["apgd-dlr"].restarts == 5 and members["fab-t"].restarts == 1
    assert members["fab-t"].settings.steps == 20
    with pytest.raises(ValueError, match="PyTorch"):
        AutoAttack(net, is_tf_model=True)
    with pytest.raises(ValueError, match="custom"):
        AutoAttack(net, attacks_to_run=["square"])
    with pytest.raises(ValueError, match="version must be one of standard, plus, rand"):
        AutoAttack(net, version="full")


def test_torchattacks_shape(trained, monkeypatch):
    net, x, y = trained
    attack = TorchAttacksAutoAttack(net, eps=0.1)
    ensemble = attack._ensemble()
    for member in ensemble.plan.values():
        assert member.steps >= 100  # 10 in torchattacks
        member.steps = 10
    monkeypatch.setattr(attack, "_ensemble", lambda: ensemble)
    x_adv = attack(x[:20], y[:20])
    assert torch.equal(attack(x[:20], y[:20]), x_adv) and (x_adv - x[:20]).abs().max() <= 0.1001
    assert ((x_adv != x[:20]).flatten(1).any(1)).any()


@pytest.mark.peers
@pytest.mark.slow
def test_verdicts_are_those_of_the_authors_package(trained):
    """Robust accuracy lies between those of five seeds of the authors' package, and verdicts equal
    theirs where all five agree; one image may differ in each."""
    package = pytest.importorskip("pyautoattack")
    net, x, y = trained
    official = []
    for seed in range(5):
        theirs = package.AutoAttack(net, norm="Linf", eps=0.1, seed=seed)
        theirs.square.n_queries = 500
        x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=50)
        official.append(net(x_adv).argmax(1) == y)
    official = torch.stack(official)
    counts = official.sum(1)
    for parity in (None, Parity.all()):
        adversary = AutoAttack(net, eps=0.1, seed=0, verbose=False, parity=parity)
        adversary.square.n_queries = 500
        _, labels = adversary.run_standard_evaluation(x, y, bs=50, return_labels=True)
        robust = labels == y
        assert counts.min() - 1 <= robust.sum() <= counts.max() + 1
        agreed = (official == official[0]).all(0)
        assert (robust != official[0])[agreed].sum() <= 1
    assert counts.min() > 5 and counts.max() < 35
