"""CW. What it has in common with other minimum-norm attacks is in `test_minimum`."""

from __future__ import annotations

import math

import pytest
import torch
from known_distances import unbounded
from networks import RowLinear

from pyadv.attacks import CW

FAST = dict(steps=60, searches=5, lr=0.05, c=0.1)


@pytest.fixture
def problem(device):
    net, x = RowLinear(20, 4, seed=3).to(device), torch.rand(8, 20, device=device)
    return net, x, net(x).argmax(1)


def margin(z, y):
    others = z.scatter(1, y[:, None], -math.inf).amax(1)
    return others - z.gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("classes, box", [(2, (None, None)), (5, (None, None)), (3, (-9.0, 9.0))])
def test_linear_distance(classes, box, device):
    net, x, y, exact = unbounded(classes, "L2", device)
    lr = 0.005 if box == (None, None) else 0.0005  # of w, in units of x or of the box
    attack = CW(net, lo=box[0], hi=box[1], steps=150, searches=7, lr=lr, c=0.03)
    distances = attack.run(x, y).distances
    assert (distances >= exact - 1e-9).all()
    assert (distances <= (1.03 if classes == 2 else 1.3) * exact + 2e-3).all()
    assert (distances / exact).median() <= 1.03


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("shift", [0.0, -50.0])
@pytest.mark.parametrize("confidence", [0.0, 2.0])
def test_confidence_and_negative_logits(confidence, shift, targeted, problem):
    """Points count only with the margin asked for, also where all logits are negative."""
    net, x, y = problem
    target = (y + 1) % 4 if targeted else y
    settings = dict(confidence=confidence, targeted=targeted, lo=-2.0, hi=3.0, **FAST)
    result = CW(lambda v: net(v) + shift, **settings).run(x, target)
    reached = margin(net(result.x_adv), target) * (-1 if targeted else 1)
    assert not result.correct.any() and (reached >= confidence - 1e-4).all()
    assert reached.median() <= confidence + 0.5  # and no more
    expected = CW(net, **settings).run(x, target)
    torch.testing.assert_close(result.distances, expected.distances, rtol=2e-2, atol=1e-3)


def test_wrong_without_confidence_is_not_enough(problem):
    net, x, y = problem
    z = net(x).detach()
    y = z.topk(2).indices[:, 1]  # x is not classified as y, by less than the confidence
    confidence = float(margin(z, y).max()) + 1.0
    result = CW(net, confidence=confidence, lo=-2.0, hi=3.0, **FAST).run(x, y)
    assert not result.correct.any() and (result.distances > 0).all()
    assert (margin(net(result.x_adv), y) >= confidence - 1e-4).all()
    assert "confidence" in CW(confidence=2.0).describe()


def test_saturated_entries_move(problem):
    net, x, _ = problem
    x = (x > 0.5).float()
    y = net(x).argmax(1)
    result = CW(net, steps=300, searches=4, lr=0.05, c=1.0).run(x, y)
    assert not result.correct.any()
    useful = (net.weight.amax(0) - net.weight.amin(0)) > 0.5
    moved = (result.x_adv - x).abs() > 1e-3
    assert moved[:, useful].float().mean() > 0.3
    still = result.x_adv[result.x_adv == x]
    assert ((still == 0) | (still == 1)).all()  # exactly


def test_each_sample_searches_for_itself(problem):
    """Own c, Adam state and end: other samples and the order of the batch change nothing."""
    net, x, y = problem
    settings = dict(abort_early=True, **FAST)
    whole = CW(net, **settings).run(x, y)
    assert whole.queries.unique().numel() > 1
    order = torch.tensor([3, 1, 7], device=x.device)
    part = CW(net, compact=False, **settings).run(x[order], y[order])
    assert torch.equal(part.x_adv, whole.x_adv[order])
    assert torch.equal(part.queries, whole.queries[order])
    full = CW(net, abort_early=False, **FAST).run(x, y)
    assert (full.queries == 2 + 5 * FAST["steps"]).all()


def test_searches_over_c(problem):
    """Too small a c finds nothing, ten times more does in the end; then halving brings it near."""
    net, x, y = problem
    settings = dict(steps=60, lr=0.05, c=1e-4)
    distances = [CW(net, searches=n, **settings).run(x, y).distances for n in (1, 5, 9)]
    assert distances[0].isinf().all() and distances[1].isfinite().any()
    assert (distances[2] <= distances[1]).all() and distances[2].isfinite().all()
