"""Reductions of rows: equal whatever the other rows, the memory layout and the threads."""

from __future__ import annotations

import math

import pytest
import torch

from pyadv.tensors import row_norm, row_sum

SHAPES = ((7,), (3, 32, 32), (3, 120, 120))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [0, 1, 2, math.inf, "sum"])
def test_a_row_depends_on_itself_alone(shape: tuple[int, ...], order: float | str, threads) -> None:
    x = torch.randn(5, *shape) * (torch.rand(5, *shape) > 0.3)
    turned = x.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not turned.is_contiguous()

    def reduced(t: torch.Tensor) -> torch.Tensor:
        return row_sum(t) if order == "sum" else row_norm(t, order)

    rows = reduced(x)
    flat = x.flatten(1).double()
    exact = flat.sum(1) if order == "sum" else torch.linalg.vector_norm(flat, order, dim=1)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(reduced(turned), rows)
    assert torch.equal(torch.cat([reduced(x[i : i + 1]) for i in range(5)]), rows)
    assert torch.equal(reduced(x[[3, 1]]), rows[[3, 1]])


def test_rows_without_entries() -> None:
    x = torch.rand(3, 0)
    for order in (0, 1, 2, math.inf):
        assert torch.equal(row_norm(x, order), torch.zeros(3))
    assert torch.equal(row_sum(x), torch.zeros(3))
