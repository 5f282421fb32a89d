"""Square finds adversarial examples without gradients. `test_square_parity` compares it with the
authors' code."""

from __future__ import annotations

import pytest
import torch
from networks import Recorded
from torch import nn

from pyadv.attacks import PGD, Square, square

EPS = {"Linf": 0.08, "L2": 0.8, "L1": 8.0}
P = {"Linf": torch.inf, "L2": 2, "L1": 1}


class RowMLP(nn.Module):
    """An MLP that computes each row independently of the batch."""

    def __init__(self, n, classes=4, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(16, n, generator=generator, dtype=dtype) / n**0.5)
        self.last = nn.Parameter(torch.randn(classes, 16, generator=generator, dtype=dtype))

    def forward(self, x):
        rows = x.flatten(1)
        hidden = torch.stack([(rows * w).sum(1) for w in self.first], 1).tanh()
        return torch.stack([(hidden * w).sum(1) for w in self.last], 1)


@pytest.fixture
def batch(device):
    x = torch.rand(8, 2, 7, 7, generator=torch.Generator().manual_seed(3)).to(device)
    model = RowMLP(98).to(device)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 5)])
def test_linear_optimum(shape, device):
    """Every pixel moves to the side of the ball that lowers the margin, also where the box
    binds."""
    torch.manual_seed(0)
    x = torch.rand(5, *shape, device=device)
    w = torch.randn(x[0].numel(), device=device)
    y = torch.zeros(5, dtype=torch.int64, device=device)

    def model(v):  # never fooled
        return torch.stack([v.flatten(1) @ w + 100, 0 * v.flatten(1).sum(1)], 1)

    x_adv = Square(model, eps=0.1, queries=1100, seed=0)(x, y)
    expected = (x - 0.1 * w.view(shape).sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)


def with_seed(attack, x, y):
    torch.manual_seed(0)
    return attack.run(x, y)


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("draws", ["keyed", "official"])
def test_finds_what_it_should_inside_ball_and_box(norm, draws, batch):
    model, x, y = batch
    x = x.clone()
    x[0, :, 0], x[1, :, 0] = 0.0, 1.0
    y = model(x).argmax(1)
    start, result = (
        with_seed(Square(model, norm=norm, eps=EPS[norm], queries=n, draws=draws), x, y)
        for n in (0, 300)
    )
    assert (result.loss >= start.loss).all() and (result.loss > start.loss).any()
    assert result.correct.sum() < start.correct.sum()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    distance = torch.linalg.vector_norm((result.x_adv - x).flatten(1).double(), P[norm], dim=1)
    assert (distance <= EPS[norm] * (1 + 1e-5)).all()


def test_asks_for_no_gradient(batch):
    model, x, y = batch

    def no_backward(v):
        assert not torch.is_grad_enabled()
        return model(v)

    recorded = Recorded(no_backward)
    result = Square(recorded, eps=1e-4, queries=20).run(x, y)
    assert len(recorded.inputs) == 22 and result.queries.tolist() == [22] * 8
    assert result.steps.tolist() == [20] * 8


def test_sees_through_a_vanishing_gradient(batch):
    """A model that rounds its input has no gradient: PGD fails on it, Square does not."""
    model, x, y = batch

    def rounded(v):
        return model((20 * v).round() / 20 + 0 * v)

    y = rounded(x).argmax(1)
    blind = PGD(rounded, eps=0.1, alpha=0.02, steps=40, start="none").run(x, y)
    assert blind.correct.all()
    assert Square(rounded, eps=0.1, queries=400).run(x, y).correct.sum() < 6


@pytest.mark.parametrize("norm", EPS)
def test_does_not_depend_on_the_batch(norm, batch):
    model, x, y = batch
    attack = Square(model, norm=norm, eps=EPS[norm] / 2, queries=60, restarts=2, seed=7)
    whole = attack.run(x, y, draw=3)
    alone = torch.cat([attack.run(x[i : i + 1], y[i : i + 1], draw=3).x_adv for i in range(8)])
    assert torch.equal(whole.x_adv, alone)
    assert 0 < whole.correct.sum() < 8
    assert not torch.equal(whole.x_adv, attack.run(x, y, draw=4).x_adv)


@pytest.mark.parametrize("draws", ["keyed", "official"])
@pytest.mark.parametrize("norm", EPS)
def test_compact_equals_masked(norm, draws, batch):
    model, x, y = batch
    eps = EPS[norm] * torch.linspace(0.1, 1, 8, device=x.device)
    settings = dict(norm=norm, eps=eps, queries=60, seed=0, draws=draws)
    masked = with_seed(Square(model, compact=False, **settings), x, y)
    compacted = with_seed(Square(model, compact=True, **settings), x, y)
    assert torch.equal(masked.x_adv, compacted.x_adv)
    assert torch.equal(masked.queries, compacted.queries)
    assert 0 < masked.correct.sum() < 8


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (3, 4, 9), (1, 9, 4), (1, 14, 14)])
@pytest.mark.parametrize("draws", ["keyed", "official"])
def test_images_of_any_size(norm, shape, draws, device):
    n = torch.Size(shape).numel()
    x = torch.rand(3, *shape, device=device)
    model = RowMLP(n).to(device)
    result = Square(model, norm=norm, eps=0.05, queries=15, draws=draws).run(x, model(x).argmax(1))
    assert result.x_adv.isfinite().all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    distance = torch.linalg.vector_norm((result.x_adv - x).flatten(1).double(), P[norm], dim=1)
    assert (distance <= 0.05 + 1e-7 * n).all()  # every element of x_adv has a rounding error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", EPS)
def test_dtypes(norm, dtype, device):
    x = torch.rand(3, 1, 6, 6, device=device).to(dtype)
    model = RowMLP(36, dtype=dtype).to(device)
    result = Square(model, norm=norm, eps=0.1, queries=10).run(x, model(x).argmax(1))
    assert result.x_adv.dtype == dtype and result.x_adv.isfinite().all()


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("norm", EPS)
def test_empty_and_single_batches(norm, size, batch):
    model, x, y = batch
    result = Square(model, norm=norm, eps=0.5, queries=5, restarts=2).run(x[:size], y[:size])
    assert result.x_adv.shape == x[:size].shape and result.correct.shape == (size,)


def test_targeted_and_function(batch):
    model, x, y = batch
    target = model(x).topk(2).indices[:, 1]
    result = Square(model, eps=0.2, queries=300, targeted=True, seed=0).run(x, target)
    assert torch.equal(result.correct, result.logits.argmax(1) != target)
    assert (~result.correct).any()
    settings = dict(eps=0.05, queries=20, seed=0)
    assert torch.equal(square(model, x, y, **settings), Square(model, **settings)(x, y))


def test_leaves_the_generator_alone(batch):
    model, x, y = batch
    before = torch.get_rng_state()
    Square(model, queries=5)(x, y)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(p=0.0), r"p must be a share in \(0, 1\]"),
        (dict(queries=-1), "queries must be an integer >= 0"),
        (dict(draws="shared"), "draws must be one of keyed, official"),
        (dict(eps=-1.0), "eps must be"),
    ],
)
def test_refuses(settings, message, batch):
    with pytest.raises(ValueError, match=message):
        Square(**settings)
    model, x, y = batch
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got x of shape \[8, 98\]"):
        Square(model)(x.flatten(1), y)
