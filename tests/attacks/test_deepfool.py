"""DeepFool. What it has in common with other minimum-norm attacks is in `test_minimum`."""

from __future__ import annotations

import pytest
import torch
from known_distances import unbounded
from torch import nn

from pyadv.attacks import DeepFool

norms = pytest.mark.parametrize("norm", ["Linf", "L2"])


@norms
@pytest.mark.parametrize("classes", [2, 5, 9])
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_linear_distance(norm, classes, overshoot, device):
    """One step, and the optimum up to the overshoot."""
    net, x, y, exact = unbounded(classes, norm, device)
    result = DeepFool(net, norm=norm, overshoot=overshoot, lo=None, hi=None).run(x, y)
    expected = (1 + overshoot) * exact.clamp(min=1e-4)  # the least step
    torch.testing.assert_close(result.distances, expected, rtol=1e-9, atol=0)
    assert (result.steps == 1).all() and (result.gradients == classes - 1).all()


def test_overshoot_lengthens_the_sum_once(device):
    """Steps to the roots of a concave margin, by Newton's method: x + 1.1 times their sum."""

    def model(v):
        f = v[:, 0].sqrt() - 0.8
        return torch.stack([-f, f], 1)

    x = torch.tensor([[0.1]], dtype=torch.float64, device=device)
    y = torch.zeros(1, dtype=torch.int64, device=device)
    total, point = 0.0, 0.1
    while point**0.5 < 0.8:
        total += (0.8 - point**0.5) * 2 * point**0.5
        point = 0.1 + 1.1 * total
    result = DeepFool(model, overshoot=0.1).run(x, y)
    assert result.x_adv.item() == pytest.approx(point, rel=1e-12) and result.steps.item() > 1


@norms
def test_classes(norm, device):
    """Only those ranked highest at x are looked at, and paid for; the nearest may be another."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 9.0]], device=device)
    bias = torch.tensor([0.0, -0.5, -2.0], device=device)
    x, y = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    for classes, distance in ((2, 0.5), (3, 2 / 9), (10, 2 / 9)):
        attack = DeepFool(lambda v: v @ weight.T + bias, norm=norm, classes=classes)
        result = attack.run(x, y)
        assert result.distances.item() == pytest.approx(1.02 * distance, rel=1e-5)
        assert result.gradients.item() == min(classes, 3) - 1


def test_samples_leave_when_they_are_fooled(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(device)
    x = torch.rand(40, 6, device=device)
    y = net(x).argmax(1)
    result = DeepFool(net, compact=False).run(x, y)
    assert result.steps.unique().numel() > 2
    assert torch.equal(result.queries, result.steps + 2)
    compacted = DeepFool(net, compact=True).run(x, y)
    torch.testing.assert_close(compacted.x_adv, result.x_adv)
    assert torch.equal(compacted.gradients, result.gradients)


def test_has_no_target():
    with pytest.raises(TypeError, match="no argument targeted"):
        DeepFool(None, targeted=True)
