"""FAB takes the same iterates as the authors' code, in float64 from x."""

from __future__ import annotations

import pytest
import torch
from networks import Recorded

from pyadv.attacks import FAB, TargetedFAB

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]
official = pytest.importorskip("pyautoattack.fab_pt", reason="pyautoattack is not installed")

EPS = {"Linf": 0.17, "L2": 1.0, "L1": 4.6}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targeted", [False, True])
def test_iterates(norm, targeted, problem):
    net, x, y = problem
    steps = 100
    model = Recorded(net)
    attack = official.FABAttack_PT(model, norm=norm, n_iter=steps, device="cpu")
    attack.target_class = 2
    expected = attack.attack_single_run(x, y, is_targeted=targeted)
    theirs = torch.stack(model.inputs[1 + targeted :])

    model = Recorded(net)
    settings = dict(norm=norm, steps=steps)
    ours = TargetedFAB(model, targets=1, **settings) if targeted else FAB(model, **settings)
    result = ours.run(x, y)
    got = torch.stack(model.inputs[1:-1])
    assert got.shape == theirs.shape == (2 * steps, *x.shape)
    torch.testing.assert_close(got, theirs, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.x_adv, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("targeted", [False, True])
def test_verdicts(norm, targeted, problem):
    """Verdicts agree for all targets, and for a sample that is misclassified from the start."""
    net, x, y = problem
    y[1] = (y[1] + 1) % 6
    attack = official.FABAttack_PT(
        net, norm=norm, n_iter=20, eps=EPS[norm], targeted=targeted, device="cpu"
    )
    attack.n_target_classes = 5
    broken = net(attack.perturb(x, y)).argmax(1) != y
    result = (TargetedFAB if targeted else FAB)(net, norm=norm, steps=20, eps=EPS[norm]).run(x, y)
    assert torch.equal(~result.correct, broken) and 1 < broken.sum() < 5
