"""Winograd convolution agrees with conv2d in float64, on awkward sizes and layouts."""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess

import pytest
import torch
import torch.nn.functional as F
from inputs import LAYOUTS, assert_same_bits, normal
from instruction_sets import HAS

from pyadv import _build, ops, reference
from pyadv.reference.convolution import winograd as winograd_op

# (B, C, N, H, W, padding, stride) around the sizes of tiles, vectors and panels; smaller than a
# tile; empty.
SIZES = (
    (2, 64, 64, 8, 8, 1, 1),
    (3, 17, 33, 7, 5, 0, 1),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 40, 4, 9, 2, 1),
    (5, 36, 5, 3, 3, 0, 1),
    (1, 15, 31, 1, 2, 2, 1),
    (2, 300, 65, 10, 6, 1, 1),
    (0, 4, 4, 8, 8, 1, 1),
    (3, 64, 33, 16, 8, 1, 2),
    (1, 1, 1, 1, 1, 1, 2),
    (2, 17, 65, 9, 15, 1, 2),
    (7, 40, 3, 2, 18, 1, 2),
    (0, 4, 4, 8, 8, 1, 2),
)


def problem(b, c, n, h, w, device="cpu"):
    x, weight, bias = (
        normal(s, seed=i, device=device) for i, s in enumerate(((b, c, h, w), (n, c, 3, 3), (n,)))
    )
    return x, weight, bias


def winograd(x, weight, bias, padding, stride=1, module=ops):
    points = module.winograd_weight(weight, stride=stride)
    return module.winograd_conv2d(x, points, bias, len(weight), padding, stride)


def assert_near(y, exact, scale):
    """Assert that y is within eight roundings of the largest sum of absolute values."""
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    if y.numel():
        allowed = 8 * torch.finfo(torch.float32).eps * scale.max()
        assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_convolution_and_its_input_gradient(size, module, device):
    *sizes, padding, stride = size
    x, weight, bias = problem(*sizes, device)
    wide = x.double().requires_grad_()
    exact = F.conv2d(wide, weight.double(), bias.double(), stride, padding)
    scale = F.conv2d(x.abs(), weight.abs(), bias.abs(), stride, padding)
    assert_near(winograd(x, weight, bias, padding, stride, module), exact.detach(), scale)
    grad = normal(tuple(exact.shape), seed=3, device=device)
    (exact,) = torch.autograd.grad(exact, wide, grad.double())
    scale = F.conv_transpose2d(grad.abs(), weight.abs(), None, stride, padding)
    points = module.winograd_weight(weight, True, stride)
    ours = module.winograd_conv2d_input(grad, points, x.shape, padding, stride)
    if x.numel():
        assert_near(ours, exact, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, weight, bias = problem(3, 20, 34, 6, 7, device)
    plain = winograd(x.contiguous(memory_format=torch.channels_last), weight, bias, 1)
    laid = LAYOUTS[layout](x), LAYOUTS[layout](weight), bias.repeat_interleave(2)[::2]
    assert_same_bits(winograd(*laid, 1), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_what_follows_is_the_same_in_one_pass(stride, layout, device):
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    x, weight, bias = problem(3, 20, 34, 6, 7, device)
    points = ops.winograd_weight(weight, False, stride)
    plain = ops.winograd_conv2d(x, points, bias, 34, 1, stride)
    added = LAYOUTS[layout](normal(tuple(plain.shape), seed=4, device=device))
    added[0, 0, 0, 0] = torch.nan
    for relu in (False, True):
        y = ops.winograd_conv2d(x, points, bias, 34, 1, stride, added=added, relu=relu)
        same(y, (plain + added).relu() if relu else plain + added)
        same(
            ops.winograd_conv2d(x, points, bias, 34, 1, stride, relu=relu),
            plain.relu() if relu else plain,
        )
    points = ops.winograd_weight(weight, True, stride)
    mask = LAYOUTS[layout](x.relu())
    mask[0, 0, 0, 0] = torch.nan
    plain = ops.winograd_conv2d_input(y, points, x.shape, 1, stride)
    masked = ops.winograd_conv2d_input(y, points, x.shape, 1, stride, mask=mask)
    same(masked, torch.ops.aten.threshold_backward(plain, mask, 0))


@pytest.mark.parametrize("stride", [1, 2])
def test_weights_are_the_references(stride, device):
    for shape in ((33, 5, 3, 3), (4, 70, 3, 3), (0, 3, 3, 3)):
        weight = normal(shape, device=device)
        for transposed in (False, True):
            spec = reference.winograd_weight(weight, transposed, stride)
            points = ops.winograd_weight(weight, transposed, stride)
            torch.testing.assert_close(points, spec, rtol=2e-7, atol=0)


def test_the_forms_are_exact_in_exact_arithmetic():
    """In float64 the result is exact up to rounding, for all strides and both directions."""
    for stride in (1, 2):
        x, weight, bias = (t.double() for t in problem(2, 5, 6, 13, 11))
        exact = F.conv2d(x, weight, bias, stride, 1)
        points = reference.winograd_weight(weight, False, stride)
        y = reference.winograd_conv2d(x, points, bias, 6, 1, stride)
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
        points = reference.winograd_weight(weight, True, stride)
        ours = reference.winograd_conv2d_input(y, points, x.shape, 1, stride)
        theirs = torch.nn.grad.conv2d_input(x.shape, weight, y, stride, 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


def test_a_typical_layer_is_nearly_as_exact_as_conv2d(device):
    x, weight, bias = problem(4, 128, 128, 16, 16, device)
    x = x.relu()
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    ours, theirs = (
        (y.double() - exact).square().mean().sqrt()
        for y in (winograd(x, weight, bias, 1), F.conv2d(x, weight, bias, padding=1))
    )
    assert ours <= 8 * theirs
    assert ours <= 1e-6 * exact.std()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_row_depends_on_nothing_else(stride):
    x, weight, bias = problem(23, 40, 40, 9, 9)
    y = winograd(x, weight, bias, 1, stride)
    points = ops.winograd_weight(weight, True, stride)
    back = ops.winograd_conv2d_input(y, points, x.shape, 1, stride)
    for i in (0, 1, 7, 22):
        one = winograd(x[i : i + 1], weight, bias, 1, stride)
        assert torch.equal(one[0], y[i])
        shape = (1, *x.shape[1:])
        assert torch.equal(ops.winograd_conv2d_input(one, points, shape, 1, stride)[0], back[i])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(winograd(x, weight, bias, 1, stride), y)
            assert torch.equal(ops.winograd_conv2d_input(y, points, x.shape, 1, stride), back)
            assert torch.equal(ops.winograd_weight(weight, True, stride), points)
    finally:
        torch.set_num_threads(threads)
    x[3, 5, 4, 4] = torch.nan
    dirty = winograd(x, weight, bias, 1, stride).isnan()
    assert dirty[3, :, 4 // stride, 4 // stride].all()
    assert not dirty[:3].any() and not dirty[4:].any()


def test_well_formed_ops(device):
    x, weight, bias = problem(2, 3, 4, 5, 6, device)
    for requires_grad in (False, True):
        weight.requires_grad_(requires_grad)
        x.requires_grad_(requires_grad)
        for transposed in (False, True):
            args = (weight, transposed, 2)
            torch.library.opcheck(torch.ops.pyadv.winograd_weight.default, args)
        points = ops.winograd_weight(weight)
        assert not points.requires_grad
        assert not ops.winograd_conv2d(x, points, bias, 4, 1).requires_grad
        added = torch.ones(2, 4, 5, 6, device=device)
        for args in (
            (x, points, None, None, None, False, 4, 5, 6, 1, 1, False),
            (x, points, bias, added, added, True, 4, 5, 6, 1, 1, False),
            (x, points, bias, None, None, False, 4, 3, 3, 1, 2, False),
            (x, points, None, None, None, True, 4, 10, 11, 0, 2, True),
        ):
            torch.library.opcheck(torch.ops.pyadv.winograd.default, args)


def test_refuses_bad_arguments(device):
    x, weight, bias = problem(2, 3, 4, 5, 6, device)
    points = ops.winograd_weight(weight)
    for error, message, args in (
        (TypeError, "weight must be a float32 tensor, got torch.float64", (weight.double(),)),
        (ValueError, r"weight must have shape \[N, C, 3, 3\], got", (weight[..., :2],)),
        (ValueError, r"weight must have shape \[N, C, 3, 3\], got", (weight[0],)),
        (ValueError, "stride must be 1 or 2, got 3", (weight, False, 3)),
    ):
        with pytest.raises(error, match=f"winograd_weight: {message}"):
            ops.winograd_weight(*args)
    for error, message, args in (
        (TypeError, "x must be a float32 tensor, got int", (3, points, None, 4, 1)),
        (TypeError, "weight must be a float32", (x, points.half(), None, 4, 1)),
        (TypeError, "bias must be a float32", (x, points, bias.int(), 4, 1)),
        (ValueError, "x must have four dimensions", (x[0], points, None, 4, 1)),
        (ValueError, "weight must .* 3 input and 33 out", (x, points, None, 33, 1)),
        (ValueError, "weight must .* 2 input and 4 out", (x[:, :2], points, None, 4, 1)),
        (ValueError, "padding must be >= 0 and .* got -1", (x, points, None, 4, -1)),
        (ValueError, r".* at least 3x3, got 0 for \[2, 6\]", (x[:, :, :2], points, None, 4, 0)),
        (ValueError, "stride must be 1 or 2, got 0", (x, points, None, 4, 1, 0)),
        (ValueError, "at stride 2 padding must be 1, got 0", (x, points, None, 4, 0, 2)),
        (ValueError, r"bias must have shape \[4\], got \[3\]", (x, points, bias[:3], 4, 1)),
        (ValueError, "weight must be on", (x, points.to("meta"), None, 4, 1)),
    ):
        with pytest.raises(error, match=f"winograd_conv2d: {message}"):
            ops.winograd_conv2d(*args)
    for message, more in (
        (r"added must have shape \[2, 4, 5, 6\]", {"added": x}),
        ("added must be a float32", {"added": x.double()}),
    ):
        with pytest.raises((ValueError, TypeError), match=f"winograd_conv2d: {message}"):
            ops.winograd_conv2d(x, points, None, 4, 1, **more)
    grad, turned = bias.new_zeros(2, 4, 5, 6), ops.winograd_weight(weight, True)
    for message, args in (
        (r"grad must have shape \[2, 4, 3, 4\] for", (grad, turned, (2, 3, 5, 6), 0)),
        (r"grad must have shape \[3, 4, 5, 6\] for", (grad, turned, (3, 3, 5, 6), 1)),
        ("padding must be 0, 1 or 2, got 3", (grad, turned, (2, 3, 1, 2), 3)),
        ("at stride 2 padding must be 1, got 2", (grad, turned, (2, 3, 9, 11), 2, 2)),
        ("weight must be .* 4 input and 40 output", (grad, turned, (2, 40, 5, 6), 1)),
    ):
        with pytest.raises(ValueError, match=f"winograd_conv2d_input: {message}"):
            ops.winograd_conv2d_input(*args)
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 3, 5, 6\], got \[2, 4"):
        ops.winograd_conv2d_input(grad, turned, (2, 3, 5, 6), 1, mask=grad)


_CALL = """
#include "cpu/kernels.h"
extern "C" __attribute__((visibility("default"))) void call(
    int form, const float* x, const float* u, const float* bias, const float* added,
    const float* mask, float* out, const int64_t* s) {
  pyadv::WinogradArgs a{};
  a.form = static_cast<pyadv::WinogradForm>(form);
  a.x = x, a.weight = u, a.bias = bias, a.added = added, a.mask = mask, a.relu = true, a.out = out;
  a.inputs = s[1], a.outputs = s[2], a.height = s[3], a.width = s[4];
  a.out_height = s[5], a.out_width = s[6], a.padding = s[7];
  const int64_t tile = pyadv::tile_of(a.form);
  a.tiles_down = (s[5] + tile - 1) / tile, a.tiles_across = (s[6] + tile - 1) / tile;
  pyadv::cpu::winograd(a, 0, s[0] * a.tiles_down * a.tiles_across);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="about the kernels for x86")
@pytest.mark.parametrize("have", HAS.values(), ids=HAS)
def test_lesser_instruction_sets(have, tmp_path):
    """Kernels for processors without AVX-512 are right. tests/instruction_sets.py runs the other
    families' on a processor that has it."""
    compiler, csrc = _build.find_compiler(), _build.source_root()
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "call.cpp").write_text(_CALL)
    sources = [csrc / "cpu" / "convolution.cpp", tmp_path / "call.cpp"]
    flags = [*_build.HOST_FLAGS, "-std=c++17", f"-I{csrc}", f"-D__builtin_cpu_supports(n)={have}"]
    library = tmp_path / "lesser.so"
    subprocess.run([*compiler, *flags, "-shared", *sources, "-o", library], check=True)
    run = ctypes.CDLL(str(library)).call
    x, weight, bias = problem(5, 35, 41, 11, 9)
    for form, (stride, transposed) in enumerate([(1, False), (2, False), (2, True)]):
        size, padding = [(11, 9), (6, 5), (22, 17)][form], 0 if transposed else 1
        # not rotated: any weight serves the test
        points = reference.winograd_weight(weight, False, stride)
        added, mask = normal((5, 41, *size), seed=5), normal((5, 41, *size), seed=6)
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in (x, added, mask)]
        out = torch.empty_like(tensors[1])
        after = (bias, *tensors[1:], True)
        spec = winograd_op(tensors[0], points, *after, 41, *size, padding, stride, transposed)
        sizes = (ctypes.c_int64 * 8)(5, 35, 41, 11, 9, *size, padding)
        places = [tensors[0], points, bias, *tensors[1:], out]
        run(form, *(ctypes.c_void_p(t.data_ptr()) for t in places), sizes)
        torch.testing.assert_close(out, spec, rtol=1e-4, atol=1e-3)
