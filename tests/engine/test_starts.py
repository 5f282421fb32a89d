"""Starts are finite for every draw, lie in ball and box, and have the documented distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import RowLinear

from pyadv import ops
from pyadv.attacks import PGD
from pyadv.engine.starts import GeneratorNoise, Noise, laplace, start, start_on_sphere

# With this id, seed 0 and draw 0, element 139 of the first draw is exactly 0.
ZERO_ID, ZERO_ELEMENT = 34651, 139
NORMS = ("Linf", "L2", "L1")


def test_a_draw_of_zero_gives_a_finite_start():
    x, ids = torch.full((1, 192), 0.5), torch.tensor([ZERO_ID])
    noise = Noise.of(ids, 0, 0)
    assert noise.uniform(x)[0, ZERO_ELEMENT] == 0
    for norm in NORMS:
        first = start("keyed", norm, x, 1.0, 0.0, 1.0, noise)
        assert first.isfinite().all() and not torch.equal(first, x)
    attack = PGD(RowLinear(192), norm="L1", eps=1.0, alpha=0.1, steps=2, seed=0)
    result = attack.run(x, torch.tensor([0]), ids=ids, draw=0)
    assert result.x_adv.isfinite().all() and result.loss.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24], ids=["least", "largest"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_starts_are_finite_at_the_ends_of_the_uniform(norm, value, dtype, monkeypatch):
    def extreme(like, *args, **settings):
        return torch.full_like(like, value)

    monkeypatch.setattr(ops, "keyed_uniform", extreme)
    monkeypatch.setattr(torch, "rand_like", extreme)
    x, noise = torch.full((2, 9), 0.5, dtype=dtype), Noise.of(torch.arange(2), 0, 0)
    for kind, first_of in (("keyed", start), ("uniform", start), ("keyed", start_on_sphere)):
        assert first_of(kind, norm, x, 1.0, 0.0, 1.0, noise).isfinite().all()


@pytest.mark.parametrize("kind", ["keyed", "generator"])
def test_laplace_noise_of_ten_million_draws(kind):
    """All values are finite; mean, mean magnitude, variance and tail are those of the
    distribution."""
    slices, n = 10, 10**6
    like = torch.empty(100, n // 100)
    total = torch.zeros(4, dtype=torch.float64)
    for k in range(slices):
        ids = torch.arange(100 * k, 100 * (k + 1))
        source = GeneratorNoise() if kind == "generator" else Noise.of(ids, 0, 0)
        noise = laplace(source, like)
        assert noise.isfinite().all()
        size = noise.abs().double()
        rest = torch.stack([size.mean(), size.square().mean(), (size > 5).double().mean()])
        total += torch.cat([noise.double().mean()[None], rest]) / slices
    draws = slices * n
    tail = math.exp(-5)
    exact = torch.tensor([0.0, 1.0, 2.0, tail], dtype=torch.float64)
    spread = torch.tensor([2.0, 1.0, 20.0, tail * (1 - tail)], dtype=torch.float64).sqrt()
    assert ((total - exact).abs() < 5 * spread / math.sqrt(draws)).all()


@pytest.mark.parametrize("kind", ["keyed", "uniform"])
@pytest.mark.parametrize("norm", NORMS)
def test_starts_stay_in_ball_and_box(kind, norm):
    x = torch.rand(200, 30)
    first = start(kind, norm, x, 0.7, 0.0, 1.0, Noise.of(torch.arange(200), 3, 1))
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    assert (torch.linalg.vector_norm(first - x, order, dim=1) <= 0.7 * (1 + 1e-5)).all()
    assert first.min() >= 0 and first.max() <= 1 and not torch.equal(first, x)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint64(3), np.int32(3)], ids=repr)
def test_integers_of_numpy_are_seeds(seed):
    x, ids = torch.rand(2, 5), torch.arange(2)
    for op in (ops.keyed_uniform, ops.keyed_normal):
        assert torch.equal(op(x, ids, seed, seed), op(x, ids, 3, 3))
    results = [
        PGD(RowLinear(5), seed=s, steps=np.int64(2), restarts=np.int64(2)).run(x, ids, draw=d).x_adv
        for s, d in ((seed, seed), (3, 3))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_other_seeds_are_refused(value):
    x, ids = torch.rand(2, 5), torch.arange(2)
    with pytest.raises(TypeError, match="seed must be an integer, got"):
        PGD(RowLinear(5), seed=value)
    with pytest.raises(TypeError, match="draw must be an integer, got"):
        PGD(RowLinear(5)).run(x, ids, draw=value)
    with pytest.raises(TypeError, match="seed must be an int or a Tensor"):
        ops.keyed_uniform(x, ids, value, 0)
    with pytest.raises(ValueError, match=r"seed must be in \[-2\^63, 2\^64\)"):
        PGD(RowLinear(5), seed=2**64)
