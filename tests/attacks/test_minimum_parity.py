"""DDN and CW against adv-lib, iterate for iterate, in float64."""

from __future__ import annotations

import sys

import pytest
import torch
from networks import Recorded

from pyadv.attacks import CW, DDN, DeepFool, SigmaZero

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("float64")]
peer = pytest.importorskip(
    "adv_lib.attacks", reason="adv-lib is not installed", exc_type=ImportError
)


@pytest.mark.parametrize("targeted", [False, True])
def test_ddn(targeted, problem):
    net, x, y = problem
    y = (y + 1) % 6 if targeted else y
    theirs = Recorded(net)
    expected = peer.ddn(theirs, x, y, steps=40, levels=None, targeted=targeted)
    ours = Recorded(net)
    result = DDN(ours, steps=40, targeted=targeted, classes="runner-up", compact=False).run(x, y)
    torch.testing.assert_close(
        torch.stack(ours.inputs[:40]), torch.stack(theirs.inputs), atol=1e-5, rtol=0
    )
    distances = (expected - x).flatten(1).norm(dim=1)
    found = distances > 0  # x stands for no point; the last iterate is not looked at there
    assert (result.distances[found] <= distances[found] + 1e-6).all() and found.any()


def test_cw(problem, monkeypatch):
    """There the last point of a search is not looked at, and the next begins with x again."""
    monkeypatch.setattr(sys.modules[CW.__module__], "_INSIDE", 1 - 1e-6)
    net, x, y = problem
    x = 0.1 + 0.8 * x
    steps, searches = 30, 4
    theirs = Recorded(net)
    peer.carlini_wagner_l2(
        *(theirs, x, y),
        **dict(initial_const=1.0, max_iterations=steps, binary_search_steps=searches),
        abort_early=False,
        confidence=0.5,
    )
    ours = Recorded(net)
    settings = dict(steps=steps, searches=searches, c=1.0, abort_early=False, confidence=0.5)
    CW(ours, compact=False, classes="runner-up", **settings)(x, y)
    for search in range(searches):
        part = slice(search * steps + 1, (search + 1) * steps)
        torch.testing.assert_close(
            torch.stack(ours.inputs[part]), torch.stack(theirs.inputs[part]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("norm", [2, float("inf")])
def test_deepfool(norm, problem):
    """There the length of each step grows by 1e-4, here it has that as its least."""
    net, x, y = problem
    expected = peer.df(net, x, y, norm=norm, steps=50)
    result = DeepFool(net, norm=norm).run(x, y)
    theirs = torch.linalg.vector_norm((expected - x).flatten(1), norm, dim=1)
    torch.testing.assert_close(result.distances, theirs, atol=0, rtol=1e-2)


def test_sigma_zero(problem):
    from adv_lib.attacks.sigma_zero import sigma_zero

    net, x, y = problem
    theirs, ours = Recorded(net), Recorded(net)
    sigma_zero(theirs, x, y, num_steps=60)
    SigmaZero(ours, steps=60, compact=False)(x, y)
    torch.testing.assert_close(
        torch.stack(ours.inputs[:60]), torch.stack(theirs.inputs), atol=1e-6, rtol=0
    )


def test_super_deepfool(problem):
    """There DeepFool's least step is added, here it is the least length."""
    from adv_lib.attacks.superdeepfool import sdf

    net, x, y = problem
    torch.set_default_dtype(torch.float32)  # their bisection is in the default dtype
    net, x = net.to(torch.float32), x.to(torch.float32)
    expected = sdf(net, x, y)
    result = DeepFool(net, variant="super").run(x, y)
    theirs = torch.linalg.vector_norm((expected - x).flatten(1), dim=1)
    torch.testing.assert_close(result.distances.to(theirs), theirs, atol=0, rtol=1e-2)
