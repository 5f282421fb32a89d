"""FMN. What it has in common with other minimum-norm attacks is in `test_minimum`."""

from __future__ import annotations

import pytest
import torch
from known_distances import in_the_box, unbounded
from networks import RowLinear

from pyadv.attacks import FMN

norms = pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])


@norms
@pytest.mark.parametrize("classes", [2, 5])
def test_linear_distance(norm, classes, device):
    net, x, y, exact = unbounded(classes, norm, device)
    distances = FMN(net, norm=norm, lo=None, hi=None, steps=150).run(x, y).distances
    assert (distances >= exact - 1e-9).all()
    assert (distances <= 1.01 * exact).all() or classes > 2
    assert (distances <= 1.5 * exact).all()  # steps lead to the class ranked next, not the nearest
    assert (distances / exact).median() <= 1.1


@norms
def test_linear_distance_in_the_box(norm, device):
    model, x, y, exact = in_the_box(norm, device)
    distances = FMN(model, norm=norm, steps=300).run(x, y).distances
    assert ((distances >= exact - 1e-9) & (distances <= 1.02 * exact)).all()


def test_l0_of_a_linear_model(device):
    """The least number of entries: those that gain most inside the box, until the sign changes."""
    torch.manual_seed(0)
    x, w = torch.rand(8, 20).to(device), torch.randn(20).to(device)
    gains = torch.where(w > 0, 1 - x, x).mul(w.abs())
    wanted = torch.tensor([1, 1, 2, 3, 4, 5, 7, 9], device=device)
    reach = gains.sort(1, descending=True).values.cumsum(1)
    most = reach.gather(1, wanted[:, None] - 1)[:, 0]
    before = torch.cat([torch.zeros_like(reach[:, :1]), reach], 1).gather(1, wanted[:, None] - 1)
    value = -(0.3 * before[:, 0] + 0.7 * most)

    def model(v):
        f = (v - x) @ w + value
        return torch.stack([-f, f], 1)

    y = torch.zeros(8, dtype=torch.int64, device=device)
    result = FMN(model, norm=0, steps=200).run(x, y)
    assert torch.equal(result.distances, (result.x_adv != x).sum(1).float())
    assert (result.distances >= wanted).all() and (result.distances <= wanted + 2).all()


def test_a_boundary_that_rounding_does_not_cross(device):
    """Where the step ends on the boundary itself the label stays; the ball must go on growing."""

    def model(v):
        f = v.flatten(1).sum(1) - 3.0
        return torch.stack([torch.zeros_like(f), f.round(decimals=3)], 1)  # flat near 0, first wins

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return model(v)

        @staticmethod
        def backward(ctx, grad):
            return grad[:, 1:].expand(-1, 4)

    x, y = torch.full((2, 4), 0.5, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    for norm in ("Linf", "L2", "L1"):
        result = FMN(Through.apply, norm=norm).run(x, y)
        assert not result.correct.any()
        exact = {"Linf": 0.25, "L2": 0.5, "L1": 1.0}[norm]
        assert (result.distances <= 1.01 * exact).all()


def test_many_classes_and_float32(device):
    net, x = RowLinear(40, 30).to(device), torch.rand(8, 40, device=device)
    y = net(x).argmax(1)
    for norm in ("Linf", "L2", "L1", "L0"):
        assert not FMN(net, norm=norm).run(x, y).correct.any()
