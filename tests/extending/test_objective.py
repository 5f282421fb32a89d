"""The page "Write your own objective": its code runs as it stands, and computes what it says."""

from __future__ import annotations

import copy
import re
from typing import Any

import pages
import pytest
import torch
import torch.nn.functional as F

from pyadv.attacks import PGD
from pyadv.objectives import Objective, Step

PAGE = "docs/extending/objective.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's program ends with."""
    torch.manual_seed(0)
    return vars(pages.run(PAGE))


@pytest.fixture
def net(page):
    return copy.deepcopy(page["model"]).double().eval()


@pytest.fixture
def batch(page):
    return page["x"].double(), page["y"]


def attack(**settings) -> PGD:
    return PGD(**{"eps": 0.05, "alpha": 0.02, "steps": 3, "seed": 0, **settings})


def test_the_program_runs_to_its_end(page):
    assert len(pages.blocks(PAGE)) >= 6
    assert all(p.grad.isfinite().all() for p in page["model"].parameters())
    assert all(m.training for m in page["model"].modules())


def test_the_base(page, net, batch):
    x, y = batch
    loss = Objective(attack(), page["smoothed_cross_entropy"])(net, x, y)
    x_adv = attack().perturb(x, y, draw=0, model=net).x_adv
    torch.testing.assert_close(loss, F.cross_entropy(net(x_adv), y, label_smoothing=0.1))


def test_the_weighting(page, net, batch):
    x, y = batch

    def make(**settings):
        return Objective(attack(), page["smoothed_cross_entropy"], page["HardSamples"](**settings))

    objective = make()
    loss = objective(net, x, y)
    z = net(objective.last["x_adv"])
    w = (1 - z.softmax(1).gather(1, y[:, None])[:, 0].detach()) ** 2
    losses = F.cross_entropy(z, y, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, (w * losses).sum() / w.sum())
    later = make(begin_epoch=2)
    later(net, x, y, epoch=1)
    assert later.last["weights"] is None

    parts = make().prepare(net, [(x[:9], y[:9]), (x[9:], y[9:])])
    torch.testing.assert_close(parts.loss(0) + parts.loss(1), loss)


def test_the_regulariser(page, net, batch):
    x, y = batch
    objective = Objective(attack()) + page["LogitPairing"](lambda epoch: 0.1 * epoch)
    loss = objective(net, x, y, epoch=3)
    z, z_adv = net(x), net(objective.last["x_adv"])
    expected = F.cross_entropy(z_adv, y) + 0.3 * (z - z_adv).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_the_second_attack(page, net, batch):
    x, y = batch
    second = attack(eps=0.1)
    objective = Objective(attack()) + page["LargerBall"](second, factor=0.5)
    plain = Objective(attack())(net, x, y)
    torch.testing.assert_close(objective(net, x, y, epoch=1), plain)
    assert second.draw == 0
    loss = objective(net, x, y, epoch=2)
    x_far = attack(eps=0.1).perturb(x, y, draw=0, model=net).x_adv
    x_adv = attack().perturb(x, y, draw=1, model=net).x_adv
    expected = F.cross_entropy(net(x_adv), y) + 0.5 * F.cross_entropy(net(x_far), y)
    torch.testing.assert_close(loss, expected)
    assert objective.state_dict() == {"attack": {"draw": 2}, "regulariser0": {"draw": 1}}


def test_every_attribute_in_the_table_is_there(net, batch):
    """The table of the page names attributes and calls of `Step`."""
    table = (pages.ROOT / PAGE).read_text().split("## The step")[1].split("## A base loss")[0]
    names = set(re.findall(r"`step\.(\w+)", table))
    assert len(names) > 10
    step = Step(net, *batch, epoch=1, attack=attack())
    for name in sorted(names):
        assert hasattr(step, name), name
