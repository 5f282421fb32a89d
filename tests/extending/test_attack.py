"""The page "Write your own attack" runs as it stands, and its attack behaves."""

from __future__ import annotations

import pages
import pytest
import torch

PAGE = "docs/extending/attack.md"
BLOCKS = pages.blocks(PAGE)


@pytest.fixture(scope="module")
def page():
    """The names that the page defines, after all its blocks have run."""
    return pages.run(PAGE)


def test_the_page_runs(page):
    assert 0 <= page.result.robust_accuracy <= 1
    assert page.loss.requires_grad
    assert "20 annealed steps" in page.attack.describe() and "2 restarts" in page.attack.describe()
    assert (page.result.x_adv - page.x).abs().max() <= 0.1 + 1e-6
    assert page.result.x_adv.min() >= 0 and page.result.x_adv.max() <= 1


def test_its_attack_finds_the_optimum_of_a_linear_model(page):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    x, y = 0.5 + 0.1 * torch.rand(6, 1, 3, 4).double(), torch.tensor([0, 1, 0, 1, 0, 1])
    w = model[1].weight[1] - model[1].weight[0]
    sign = (1.0 - 2.0 * y).double()  # the margin grows along sign * w
    best = sign * (model(x)[:, 1] - model(x)[:, 0]) + 0.05 * w.abs().sum()
    attack = page.CosinePGD(model, eps=0.05, steps=20, seed=0)
    result = attack.run(x, y)
    assert torch.equal(result.correct, best <= 0)


def test_its_rule_is_compacted_and_batched_like_the_others(page):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    x = torch.rand(6, 1, 3, 4).double()
    y = model(x).argmax(1)
    whole = page.CosinePGD(model, eps=0.05, steps=6, seed=0).perturb(x, y, draw=0)
    for i in range(6):
        one = page.CosinePGD(model, eps=0.05, steps=6, seed=0).perturb(
            x[i : i + 1], y[i : i + 1], draw=0
        )
        assert torch.equal(one.x_adv[0], whole.x_adv[i])


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_blocks_are_short(block):
    assert len(BLOCKS[block].splitlines()) <= 32
