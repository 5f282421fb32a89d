"""Soft thresholding against known values and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same_bits,
    layout_pairs,
    normal,
    with_specials,
)

from pyadv import ops, reference


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_known_values(module, device):
    x = torch.tensor([[3.0, -3.0, 0.5, -0.5, 0.0, math.inf, math.nan]], device=device)
    expected = torch.tensor([[2.0, -2.0, 0.0, 0.0, 0.0, math.inf, math.nan]], device=device)
    assert_same_bits(module.shrink(x, 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, device):
    x = with_specials(normal(shape, dtype, device=device))
    for threshold in (0.0, 0.7, torch.linspace(0, 1, shape[0], device=device)):
        assert_same_bits(ops.shrink(x, threshold), reference.shrink(x, threshold))


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
def test_layouts_and_out(layouts, device):
    x = normal((3, 3, 4, 5), device=device)
    given, out = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](torch.zeros_like(x))
    assert ops.shrink(given, 0.3, out=out) is out
    assert torch.equal(out, reference.shrink(x, 0.3))
    ops.shrink(given, 0.3, out=given)
    assert torch.equal(given, out)


def test_bad_input(device):
    x = normal((3, 4), device=device)
    with pytest.raises(ValueError, match="shrink: threshold must be a number >= 0, got -1"):
        ops.shrink(x, -1.0)
    with pytest.raises(ValueError, match="expected 3, got 2"):
        ops.shrink(x, torch.ones(2, device=device))
    with pytest.raises(TypeError, match="shrink: x must be float16, bfloat16, float32 or float64"):
        ops.shrink(torch.ones(3, dtype=torch.int64, device=device), 1.0)
    with pytest.raises(ValueError, match="shrink: out shares memory with an input"):
        ops.shrink(x[1:], 1.0, out=x[:-1])


def test_opcheck(device):
    x, threshold = normal((3, 4), device=device), torch.tensor(0.5)
    torch.library.opcheck(torch.ops.pyadv.shrink.default, (x, threshold))
    out = torch.empty_like(x)
    torch.library.opcheck(torch.ops.pyadv.shrink_out.default, (x, threshold, out))
