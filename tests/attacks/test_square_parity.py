"""Square makes the same queries as the authors' code, in float64 with their draws for the batch."""

from __future__ import annotations

import pytest
import torch
from networks import Recorded
from torch import nn

from pyadv.attacks import Square

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]
official = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed")

EPS = {"Linf": 0.04, "L2": 0.5, "L1": 3.0}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("shape", [(1, 15, 15), (3, 10, 10)])
def test_proposals(norm, shape):
    torch.manual_seed(1)
    x = torch.rand(12, *shape)
    n = x[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(n, 40), nn.Tanh(), nn.Linear(40, 5))
    with torch.no_grad():
        net[-1].weight *= 4
    y = net(x).argmax(1)

    model = Recorded(net)
    attack = official.SquareAttack(
        model, norm=norm, n_queries=300, eps=EPS[norm], seed=5, device="cpu", resc_schedule=False
    )
    attack.init_hyperparam(x)
    torch.manual_seed(5)
    _, expected = attack.attack_single_run(x, y)
    theirs = model.inputs

    model = Recorded(net)
    torch.manual_seed(5)
    ours = Square(model, norm=norm, eps=EPS[norm], queries=300, draws="official", compact=False)
    got = ours.run(x, y)
    broken = net(expected).argmax(1) != y
    assert torch.equal(~got.correct, broken) and 0 < broken.sum() < 12
    # In L2 the unused budget is the root of a difference of squares, which amplifies rounding.
    atol = 1e-5 if norm == "L2" else 1e-9
    torch.testing.assert_close(got.x_adv, expected, atol=atol, rtol=0)
    assert len(model.inputs) == len(theirs) + 1  # one pass more gives the verdict
