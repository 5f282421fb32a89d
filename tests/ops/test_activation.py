"""`affine_relu` and its gradient equal their references bit for bit, and autograd's gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same_bits,
    expanded,
    layout_pairs,
    normal,
    uniform,
    with_specials,
)

from pyadv import ops, reference


def channels(shape, dtype, device, seed):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = uniform(shape[1:2], wide, seed=seed, device=device, low=-1.5, high=1.5)
    return values if len(shape) > 1 else None


def problem(shape, dtype, device):
    """Return x, added, grad, other and, where there are channels, scale and shift."""
    tensors = [normal(shape, dtype, seed=i, device=device) for i in range(4)]
    return *tensors, *(channels(shape, dtype, device, seed) for seed in (5, 6))


def both(name, *args, **more):
    """Return the op's result, after comparing it with that of the reference."""
    ours, spec = (getattr(module, name)(*args, **more) for module in (ops, reference))
    pairs = zip(ours, spec, strict=True) if isinstance(spec, tuple) else [(ours, spec)]
    for a, b in pairs:
        assert_same_bits(a, b)
        assert not a.requires_grad
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 4, 4), (2, 8, 300)], ids=str)
def test_it_is_the_reference(shape, dtype, device):
    x, added, grad, other, scale, shift = problem(shape, dtype, device)
    for t in (x, added, grad, other):
        t.copy_(with_specials(t))
    for slope, many in itertools.product((0.0, 0.1), (False, True)):
        more = {"added": added, "keep_sum": True} if many else {}
        y = both("affine_relu", x, scale, shift if many else None, slope=slope, **more)
        y = y[0] if many else y
        both("affine_relu", x, None, shift, slope=slope, added=added if many else None)
        both("affine_relu_backward", y, grad, other if many else None, slope=slope)
        both("affine_relu_backward", y, grad, None, added=added, scale=scale, slope=slope)
        both("affine_relu_backward", y, grad, other, added=added, scale=scale, slope=slope)


@pytest.mark.parametrize("layouts", list(layout_pairs()), ids="-".join)
def test_layouts(layouts, device):
    first, second = (LAYOUTS[name] for name in layouts)
    for shape, dtype in (((3, 16, 4, 6), torch.float32), ((2, 5, 3, 3), torch.bfloat16)):
        x, added, grad, other, scale, shift = problem(shape, dtype, device)
        x, added, grad, other = first(x), second(added), second(grad), first(other)
        y, _ = both("affine_relu", x, scale, shift, added=added, keep_sum=True)
        both("affine_relu_backward", y, grad, other, added=added, scale=scale)
        both("affine_relu_backward", y, expanded(grad[0], shape[0]), other)
    y = LAYOUTS["channels_last"](x)
    assert ops.affine_relu(y).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_it_is_what_autograd_computes(slope, device):
    x, added, grad, other, scale, shift = problem((3, 6, 5, 4), torch.float64, device)
    x.requires_grad_()
    total = x + added
    wide = (t.view(1, -1, 1, 1) for t in (scale, shift))
    y = F.leaky_relu(total * next(wide) + next(wide), slope)
    ours, ours_sum = ops.affine_relu(
        x.detach(), scale, shift, added=added, slope=slope, keep_sum=True
    )
    torch.testing.assert_close(ours, y.detach())
    torch.testing.assert_close(ours_sum, total.detach())
    elsewhere = normal((3, 6, 5, 4), torch.float64, seed=9, device=device)
    (exact,) = torch.autograd.grad([y, total], x, [grad + other, elsewhere])
    more = {"added": elsewhere, "scale": scale, "slope": slope}
    torch.testing.assert_close(ops.affine_relu_backward(ours, grad, other, **more), exact)


def test_the_plain_form_is_a_mask_of_a_sum(device):
    y = torch.tensor([[1.0, 0.0, -0.0, -2.0, math.nan, math.inf, 1e-45]], device=device)
    a = torch.tensor([[1.0, 2.0, 3.0, math.nan, 5.0, 6.0, 7.0]], device=device)
    expected = torch.tensor([[11.0, 0, 0, 0, 15, 16, 17]], device=device)
    torch.testing.assert_close(ops.affine_relu_backward(y, a, a.new_full((1, 7), 10.0)), expected)
    infinite = torch.tensor([[-math.inf, math.inf, math.nan, -1.0]], device=device)
    expected = torch.tensor([[0, math.inf, math.nan, 0.0]], device=device)
    torch.testing.assert_close(ops.affine_relu(infinite), expected, equal_nan=True)


def test_well_formed_ops(device):
    x, added, grad, other, scale, shift = problem((2, 3, 5, 4), torch.float32, device)
    forward = torch.ops.pyadv.affine_relu.default
    backward = torch.ops.pyadv.affine_relu_backward.default
    for requires_grad in (False, True):
        for t in (x, added):
            t.requires_grad_(requires_grad)
        torch.library.opcheck(forward, (x, scale, shift, added, 0.1, True))
        torch.library.opcheck(forward, (x, None, None, None, 0.0, False))
        torch.library.opcheck(backward, (x, grad, other, added, scale, 0.1))
        torch.library.opcheck(backward, (x, grad, None, None, None, 0.0))


def test_refuses_bad_arguments(device):
    x, added, _, _, scale, shift = problem((2, 3, 5, 4), torch.float32, device)
    for error, message, args, more in (
        (TypeError, "x must be a Tensor, got int", (3,), {}),
        (TypeError, "x must be float16, bfloat16, float32 or float64", (x.long(),), {}),
        (TypeError, "added must have the dtype of x", (x,), {"added": added.half()}),
        (ValueError, r"scale must have shape \[3\], got \[2\]", (x, scale[:2]), {}),
        (
            TypeError,
            "shift must be torch.float32 for torch.bfloat16",
            (x.bfloat16(), None, shift.bfloat16()),
            {},
        ),
        (ValueError, r"scale needs channels, dimension 1, got \[4\]", (x[0, 0, 0], scale), {}),
        (ValueError, "scale must be on", (x, scale.to("meta")), {}),
        (ValueError, "slope must be finite and >= 0, got -1", (x,), {"slope": -1}),
        (ValueError, "slope must be finite and >= 0, got nan", (x,), {"slope": math.nan}),
        (TypeError, "slope must be a float, got str", (x,), {"slope": "1"}),
        (TypeError, "keep_sum must be a bool", (x,), {"keep_sum": 1}),
        (ValueError, "keep_sum needs added, got None", (x,), {"keep_sum": True}),
    ):
        with pytest.raises(error, match=f"affine_relu: {message}"):
            ops.affine_relu(*args, **more)
    for error, message, args, more in (
        (ValueError, r"grad must have the shape of y, got \[2, 3, 5\]", (x, x[..., 0]), {}),
        (ValueError, "other must have the shape of y", (x, x, x[:1]), {}),
        (TypeError, "added must have the dtype of y", (x, x), {"added": x.double()}),
        (TypeError, "scale must be torch.float32", (x, x), {"scale": scale.double()}),
        (ValueError, "slope must be finite", (x, x), {"slope": math.inf}),
    ):
        with pytest.raises(error, match=f"affine_relu_backward: {message}"):
            ops.affine_relu_backward(*args, **more)
