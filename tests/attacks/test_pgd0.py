"""PGD0. What it has in common with other attacks is in `test_every_attack`."""

from __future__ import annotations

import pytest
import torch
from networks import ConvNet, RowLinear

from pyadv.attacks import PGD0, pgd0
from pyadv.attacks.pgd0 import l0_project


def changed(x_adv, x, pixels=False):
    differs = x_adv != x
    return (differs.any(1) if pixels else differs).flatten(1).sum(1)


@pytest.fixture
def problem(device):
    torch.manual_seed(0)
    net = ConvNet(4).to(device).eval()
    x = torch.rand(8, 3, 6, 6, device=device)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("best", ["last", "loss", "fooled"])
@pytest.mark.parametrize("start", ["keyed", "none"])
def test_inside_ball_and_box(pixels, best, start, problem):
    net, x, y = problem
    eps = torch.tensor([0, 1, 2, 3, 5, 8, 13, 1000], device=x.device)
    settings = dict(pixels=pixels, best=best, start=start, steps=7, seed=0)
    x_adv = PGD0(net, eps=eps, **settings)(x, y)
    assert (changed(x_adv, x, pixels) <= eps).all() and torch.equal(x_adv[0], x[0])
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and not torch.equal(x_adv, x)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("start", ["keyed", "none"])
def test_linear_optimum(pixels, start, device):
    """The best entries are those of largest |w| times room, and go to the box; the best pixels
    those of the largest sum over channels."""
    x = torch.rand(6, 3, 5, 5, device=device)
    y = torch.tensor([0, 1, 0, 1, 1, 0], device=device)
    model = RowLinear(75, classes=2).to(device)
    w = (model.weight.detach()[1 - y] - model.weight.detach()[y]).view_as(x)
    gains = w.abs() * torch.where(w > 0, 1 - x, x)
    gains = (gains.sum(1) if pixels else gains).flatten(1).sort(1, descending=True).values
    for eps in (1, 4, 12):
        attack = PGD0(model, eps=eps, pixels=pixels, start=start, best="loss", steps=60, seed=0)
        gain = (w * (attack(x, y) - x)).flatten(1).sum(1)
        most = gains[:, :eps].sum(1)
        assert (gain <= most * (1 + 1e-5)).all() and (gain >= 0.98 * most).all(), gain / most


def test_projection_is_the_nearest_point(device):
    """Against all sets of two of five entries."""
    x, point = torch.rand(6, 5, device=device), 2 * torch.rand(6, 5, device=device) - 0.5
    count = torch.full((6,), 2.0, device=device)
    found = l0_project(point, x, count, 0.0, 1.0)
    assert (changed(found, x) <= 2).all()
    nearest = torch.full((6,), torch.inf, device=device)
    for i in range(5):
        for j in range(i):
            other = x.clone()
            other[:, [i, j]] = point[:, [i, j]].clamp(0, 1)
            nearest = torch.minimum(nearest, (other - point).norm(dim=1))
    torch.testing.assert_close((found - point).norm(dim=1), nearest)


def test_more_entries_and_restarts_fool_more(problem):
    net, x, y = problem

    def left(**settings):
        return PGD0(net, steps=20, seed=0, **settings).run(x, y).correct

    assert left(eps=0).all() and not left(eps=108).any()
    assert (left(eps=6) >= left(eps=6, restarts=4)).all()


def test_batch_does_not_matter(device):
    net, x = RowLinear(24, 4).to(device), torch.rand(5, 24, device=device)
    y = net(x).argmax(1)
    attack = PGD0(net, eps=3, steps=6, seed=0, best="loss")
    whole = attack.perturb(x, y, draw=0).x_adv
    for i in range(5):
        assert torch.equal(attack.perturb(x[i : i + 1], y[i : i + 1], draw=0).x_adv[0], whole[i])
    assert torch.equal(pgd0(net, x, y, eps=3, steps=6, seed=0, best="loss"), whole)
    assert attack.describe().startswith("L0 3, 6 steps, loss margin")


def test_a_start_of_ones_own_is_projected(problem):
    net, x, y = problem
    x_adv = PGD0(net, eps=2, steps=0, start=lambda x: 1 - x, best="last")(x, y)
    assert (changed(x_adv, x) == 2).all()
    with pytest.raises(ValueError, match="start must return the shape of x"):
        PGD0(net, start=lambda x: x[:1])(x, y)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(eps=2.5), ValueError, "eps must count entries or pixels: a whole number, got 2.5"),
        (dict(eps=torch.tensor([1.0, 0.5])), ValueError, "eps must count"),
        (dict(eps=torch.ones(1, 3)), ValueError, r"one count or one per sample \(B,\)"),
        (dict(eps=-1), ValueError, "eps must be a finite number >= 0"),
        (dict(alpha=-1.0), ValueError, "alpha must be"),
        (dict(pixels="yes"), ValueError, "pixels must be one of True, False"),
        (dict(start="uniform"), ValueError, "start must be one of keyed, none"),
        (dict(loss="kl"), ValueError, "belongs to PGD"),
    ],
)
def test_refuses_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PGD0(None, **settings)


def test_pixels_need_images(device):
    x, y = torch.rand(2, 12, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"pixels=True needs images \(B, C, H, W\)"):
        PGD0(RowLinear(12).to(device), pixels=True)(x, y)
    with pytest.raises(TypeError, match="x must be a Tensor"):
        PGD0(RowLinear(12).to(device), pixels=True)(3, y)
