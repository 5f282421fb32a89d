"""Projections agree with the reference and with bisection in float64, and are projections."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same_bits,
    assert_within_twice,
    layout_pairs,
    normal,
    uniform,
    with_specials,
)
from torch import Tensor

from pyadv import ops, reference

L2_EXACT = "l2_project exact"
PROJECTIONS = ("linf_project", "l2_project", L2_EXACT, "l1_project")
ROW_PROJECTIONS = PROJECTIONS[1:]
# Radii that bind in some rows for inputs about 0.3 away from x, for any length of the rows.
RADII = {"linf_project": 0.1, "l2_project": 0.3, L2_EXACT: 0.3, "l1_project": 0.5}


def project(name: str, module=ops):
    """Return the projection with the signature that all of them share."""
    op, _, exact = name.partition(" ")
    function = getattr(module, op)
    return (lambda *args, **kw: function(*args, exact=True, **kw)) if exact else function


def points(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    x = uniform(shape, dtype, 1, device)
    return (x + normal(shape, dtype, 2, device, 0.3)).to(dtype), x


def in_float64(name: str, v: Tensor, x: Tensor, *args) -> Tensor:
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    return project(name, reference)(v.double(), x.double(), *wide)


def check_rows(name: str, v: Tensor, x: Tensor, *args, **kw) -> Tensor:
    actual = project(name)(v, x, *args, **kw)
    by_torch = project(name, reference)(v, x, *args)
    assert actual.dtype == v.dtype and actual.shape == v.shape
    assert_within_twice(actual, by_torch, in_float64(name, v, x, *args))
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linf_equals_reference(shape, dtype, device):
    v, x = points(shape, dtype, device)
    v = with_specials(v)
    for eps in (0.0, 0.1, torch.rand(shape[:1], device=device)):
        assert_same_bits(ops.linf_project(v, x, eps), reference.linf_project(v, x, eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROW_PROJECTIONS)
def test_rows_agree_with_reference(name, shape, dtype, device):
    v, x = points(shape, dtype, device)
    for eps in (0.0, RADII[name], 1e4, torch.linspace(0, 1, shape[0], device=device)):
        check_rows(name, v, x, eps)
        check_rows(name, v, x, eps, None, None)
        check_rows(name, v, x, eps, None, 0.9)


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_layouts(name, layouts, device):
    v, x = points((3, 3, 4, 5), torch.float32, device)
    expected = project(name)(v, x, RADII[name])
    v, x = LAYOUTS[layouts[0]](v), LAYOUTS[layouts[1]](x)
    actual = project(name)(v, x, RADII[name])
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-7)
    assert actual.stride() == torch.empty_like(v).stride()
    written = LAYOUTS[layouts[1]](torch.empty_like(expected))
    assert project(name)(v, x, RADII[name], out=written) is written
    torch.testing.assert_close(written, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_expanded_centre_and_per_channel_box(name, device):
    v, _ = points((3, 3, 4, 5), torch.float32, device)
    x = uniform((3, 4, 5), seed=1, low=0.3, high=0.6, device=device).expand(3, 3, 4, 5)
    lo = torch.tensor([0.1, 0.2, 0.3], device=device).view(1, 3, 1, 1)
    hi = torch.tensor([0.6, 0.7, 0.8], device=device).view(3, 1, 1)
    for layout in ("contiguous", "channels_last"):
        actual = project(name)(LAYOUTS[layout](v), x, RADII[name], lo, hi)
        expected = in_float64(name, v, x, RADII[name], lo, hi)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-7)
        assert ((actual >= lo) & (actual <= hi)).all()
    full = torch.full_like(v, 0.6)
    torch.testing.assert_close(
        project(name)(v, x, RADII[name], 0.1, full), project(name)(v, x, RADII[name], 0.1, 0.6)
    )


@pytest.mark.parametrize("name", PROJECTIONS)
def test_in_place_counts_as_a_write(name, device):
    v, x = points((2, 3, 4), torch.float32, device)
    expected, version = project(name)(v, x, RADII[name]), v._version
    assert project(name)(v, x, RADII[name], out=v) is v
    assert_same_bits(v, expected)
    assert v._version > version


def test_l1_published_example(device):
    """The projection uses the whole budget. Duchi's projection followed by a clamp gives
    (.55, .05, 0, 0)."""
    x = torch.tensor([[0.5, 0.9, 0.1, 0.4]], device=device)
    moved = x + torch.tensor([[1.0, 0.5, -0.4, 0.2]], device=device)
    expected = x + torch.tensor([[0.5, 0.1, 0.0, 0.0]], device=device)
    torch.testing.assert_close(ops.l1_project(moved, x, 0.6), expected, rtol=0, atol=1e-7)


def by_bisection(name: str, v: Tensor, x: Tensor, eps: float) -> Tensor:
    """Compute the projection onto ball and [0, 1] from its optimality conditions alone."""
    v, x = v.double().flatten(1), x.double().flatten(1)
    d = v - x
    room = torch.where(d > 0, 1 - x, x)
    if name == "l1_project":
        shrink, limit = (lambda t: (d.abs() - t).clamp(min=0).minimum(room)), eps
        high = d.abs().amax(1, keepdim=True)
        power = 1
    else:
        shrink, limit = (lambda t: ((1 - t) * d.abs()).minimum(room)), eps**2
        high = torch.ones_like(d[:, :1])
        power = 2

    def length(z):
        return z.pow(power).sum(1, keepdim=True)

    low = torch.zeros_like(high)
    inside = length(shrink(low)) <= limit
    for _ in range(100):
        middle = (low + high) / 2
        outside = length(shrink(middle)) > limit
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return x + d.sign() * shrink(torch.where(inside, torch.zeros_like(high), high))


@pytest.mark.parametrize("eps", [1e-3, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("name", ["l1_project", L2_EXACT])
def test_exact_projection_is_optimal(name, eps, device):
    x = uniform((6, 3, 8, 8), torch.float32, 3, device)
    scale = torch.tensor([1e-3, 0.03, 0.3, 1.0, 2.0, 5.0], device=device).view(6, 1, 1, 1)
    v = x + scale * normal((6, 3, 8, 8), torch.float32, 4, device)
    v[2, 0] = x[2, 0]  # entries that do not move
    v[3, 1] = x[3, 1] + 0.25  # ties
    actual = project(name)(v, x, eps).flatten(1).double()
    torch.testing.assert_close(actual, by_bisection(name, v, x, eps), rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 70),
    eps=st.floats(0, 8),
    spread=st.floats(1e-3, 30),
    name=st.sampled_from(PROJECTIONS),
)
def test_feasible_and_idempotent(seed, n, eps, spread, name):
    x = uniform((2, n), torch.float64, seed)
    v = x + normal((2, n), torch.float64, seed + 1, scale=spread)
    z = project(name)(v, x, eps)
    order = {"linf_project": math.inf, "l1_project": 1}.get(name, 2)
    length = torch.linalg.vector_norm(z - x, ord=order, dim=1)
    assert (length <= eps * (1 + 1e-12) + 1e-15 * n).all()
    assert ((z >= 0) & (z <= 1)).all()
    torch.testing.assert_close(project(name)(z, x, eps), z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_projection_of_a_sparse_point_on_the_sphere(module, dtype, device):
    """Rounding decides whether such a point lies inside, but entries equal to x must not move."""
    x = torch.rand(5000, 30, dtype=dtype, device=device)
    x[:, :3] = 0.0  # entries that show the smallest change
    v = x + torch.randn_like(x) * (torch.rand_like(x) < 0.2)
    for _ in range(3):
        before, v = v, module.l1_project(v, x, 1.5)
        assert (v - x).abs().sum(1).max() <= 1.5 * (1 + 1e-6)
        assert torch.equal((v != x) & (before == x), torch.zeros_like(x, dtype=torch.bool))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_l2_norm_of_any_size(size, device):
    x = torch.zeros(2, 40, device=device)
    v = normal((2, 40), seed=5, device=device) * size
    moved = ops.l2_project(v, x, 0.5 * size, None, None)
    length = torch.linalg.vector_norm(moved.double(), dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.5 * size), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ROW_PROJECTIONS)
def test_rows_inside_are_only_clipped(name, device):
    x = uniform((3, 50), seed=6, device=device)
    v = x + normal((3, 50), seed=7, scale=0.3, device=device)
    assert_same_bits(project(name)(v, x, 1e3), v.clamp(0, 1))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_centre_outside_the_box(name, device):
    x = uniform((3, 50), seed=6, low=-1, high=2, device=device)
    v = x + normal((3, 50), seed=7, device=device)
    z = project(name)(v, x, 0.4)
    assert ((z >= 0) & (z <= 1)).all()
    torch.testing.assert_close(z.double(), in_float64(name, v, x, 0.4), rtol=0, atol=5e-7)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_nan_and_infinity_stay_in_their_row(name, device):
    x = uniform((4, 20), seed=8, device=device)
    v = x + 0.1
    v[1, 3], v[2, 5] = math.nan, math.inf
    z = project(name)(v, x, RADII[name])
    clean = project(name)(x + 0.1, x, RADII[name])
    assert_same_bits(z[::3], clean[::3])
    assert z[1, 3].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROW_PROJECTIONS)
def test_long_rows(name, device):
    v, x = points((2, 3, 224, 224), torch.float32, device)
    check_rows(name, v, x, 20.0)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(name, dtype, device):
    v, x = points((2, 3, 4), dtype, device)
    op = name.partition(" ")[0]
    eps, lo = torch.tensor(RADII[name]), torch.tensor(0.0)
    args = (v, x, eps, lo, None, *([name == L2_EXACT] if op == "l2_project" else []))
    torch.library.opcheck(getattr(torch.ops.pyadv, op).default, args)
    out = torch.empty_like(v)
    torch.library.opcheck(getattr(torch.ops.pyadv, op + "_out").default, (*args, out))


def test_messages(device):
    v, x = points((2, 3, 4), torch.float32, device)
    with pytest.raises(ValueError, match="l2_project: eps must be a number >= 0, got -1"):
        ops.l2_project(v, x, -1.0)
    with pytest.raises(ValueError, match="l1_project: eps must be a number or hold one per sample"):
        ops.l1_project(v, x, torch.ones(1, 3, 1, device=device))
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 3, 4\]"):
        ops.l1_project(v, x[:, :, 0], 1.0)
    with pytest.raises(TypeError, match="linf_project: x must have the dtype of x_adv"):
        ops.linf_project(v, x.double(), 1.0)
    with pytest.raises(ValueError, match="lo must not be above hi, got lo=1.0 and hi=0.0"):
        ops.l2_project(v, x, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="out shares memory with an input"):
        ops.l2_project(v, x, 1.0, out=x.as_strided((2, 3, 4), (12, 1, 3)))
