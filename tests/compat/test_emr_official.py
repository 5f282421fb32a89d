"""Networks that set their own mode, as those of EMR's code do, behind `compat.emr.official`."""

from __future__ import annotations

import copy

import pytest
import torch
from objective_parts import attack, make_batch, make_net
from torch import nn

from pyadv.attacks import PGD
from pyadv.compat import emr
from pyadv.objectives import AT, AWP, EMR, TRADES


class SelfModed(nn.Module):
    """Calls train() or eval() in its forward pass, and ends in train mode whatever it was told."""

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, _eval=False):
        self.eval() if _eval else self.train()
        features = self.net[:-1](x)
        self.train()
        return self.net[-1](features)


@pytest.fixture
def pair():
    """The network behind the wrapper, and the same one that leaves its mode alone."""
    network = SelfModed().double()
    return emr.official(network), copy.deepcopy(network.net)


@pytest.fixture
def batch():
    x, y = make_batch()
    return x.double(), y


def assert_same_network(wrapped, plain):
    for (name, p), q in zip(
        wrapped.network.net.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_attacks_run_in_eval_mode_and_leave_nothing(speed, pair, batch):
    wrapped, plain = pair
    settings = {"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0, "speed": speed}
    x_adv = PGD(wrapped, **settings)(*batch)
    expected = PGD(plain, **settings)(*batch)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)
    assert_same_network(wrapped, plain)
    assert all(m.training for m in wrapped.modules())


def test_follows_the_mode_that_is_set(pair, batch):
    wrapped, plain = pair
    for mode in (False, True, False):
        wrapped.train(mode)
        plain.train(mode)
        torch.testing.assert_close(wrapped(batch[0]), plain(batch[0]))
        assert all(m.training == mode for m in wrapped.modules())
    assert_same_network(wrapped, plain)


def test_modes_come_back_after_an_error(pair, batch):
    wrapped, _ = pair
    wrapped.eval()
    with pytest.raises(RuntimeError):
        wrapped(batch[0][:, :, 0])
    assert not any(m.training for m in wrapped.modules())


def test_the_attack_of_the_official_scripts(pair, batch):
    """It ran in train mode: bn="train" with update_stats=True does the same on purpose."""
    wrapped, plain = pair
    settings = {"eps": 0.05, "alpha": 0.02, "steps": 4, "seed": 0}
    x_adv = PGD(wrapped, **settings, bn="train", update_stats=True)(*batch)
    torch.testing.assert_close(x_adv, PGD(plain, **settings, bn="train", update_stats=True)(*batch))
    assert_same_network(wrapped, plain)
    assert int(plain[1].num_batches_tracked) == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: AT(attack()) + EMR(0.5, temperature=2.0),
        lambda: AT(attack()) + EMR(0.5, derivative="double"),
        lambda: AT(attack()) + EMR(0.5, derivative="difference"),
        lambda: AWP(TRADES(attack(loss="kl")), gamma=0.05),
    ],
    ids=["tangent", "double", "difference", "awp"],
)
def test_objectives_train_the_same_network(make, pair, batch):
    wrapped, plain = pair
    for net in (wrapped, plain):
        objective, optimizer = make(), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            objective(net, *batch).backward()
            optimizer.step()
    assert_same_network(wrapped, plain)


def test_the_penalty(pair, batch):
    wrapped, plain = pair
    a, b = emr.emr_penalty(wrapped, batch[0], 0.1), emr.emr_penalty(plain, batch[0], 0.1)
    torch.testing.assert_close(a, b)
    for p, q in zip(wrapped.parameters(), plain.parameters(), strict=True):
        g, h = (
            torch.autograd.grad(r, w, retain_graph=True, materialize_grads=True, allow_unused=True)[
                0
            ]
            for r, w in ((a, p), (b, q))
        )
        torch.testing.assert_close(g, h)
    assert int(wrapped.network.net[1].num_batches_tracked) == 0


def test_refuses_other_networks():
    with pytest.raises(TypeError, match="forward has an argument _eval.*got Sequential"):
        emr.official(make_net())
    with pytest.raises(TypeError, match="got function"):
        emr.official(lambda x: x)
