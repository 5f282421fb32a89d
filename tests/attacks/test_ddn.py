"""DDN. What it has in common with other minimum-norm attacks is in `test_minimum`."""

from __future__ import annotations

import pytest
import torch
from known_distances import in_the_box, unbounded
from networks import RowLinear

from pyadv.attacks import DDN


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_distance(classes, device):
    net, x, y, exact = unbounded(classes, "L2", device)
    distances = DDN(net, lo=None, hi=None, steps=300).run(x, y).distances
    assert (distances >= exact).all()
    assert (distances <= (1.02 if classes == 2 else 1.3) * exact + 1e-3).all()
    assert (distances / exact).median() <= 1.03


def test_linear_distance_in_the_box(device):
    model, x, y, exact = in_the_box("L2", device)
    distances = DDN(model, steps=300).run(x, y).distances
    assert ((distances >= exact) & (distances <= 1.03 * exact)).all()


def test_confident_samples(device):
    """Cross-entropy's gradient is kept from vanishing: logits may have any scale."""
    net, x = RowLinear(20, 4, dtype=torch.float32).to(device), torch.rand(6, 20, device=device)
    y = net(x).argmax(1)
    expected = DDN(net).run(x, y).distances
    distances = DDN(lambda v: 300 * net(v)).run(x, y).distances
    assert expected.isfinite().all() and (distances <= 1.05 * expected).all()


def test_first_radius_and_step(device):
    """After one step along the gradient, x_adv lies on the sphere grown by gamma."""
    net, x, y, _ = unbounded(2, "L2", device)
    settings = dict(lo=None, hi=None, steps=1, gamma=0.1, alpha=0.3, start_radius=40.0)
    result = DDN(net, **settings).run(x, y)
    torch.testing.assert_close(result.distances, torch.full_like(result.distances, 44.0))
