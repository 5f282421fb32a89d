"""What lies between two convolutions, in one pass forward and one back.

`affine_relu` computes the sum of a residual connection, BatchNorm in evaluation mode or a bias, and
a ReLU. `affine_relu_backward` computes their gradient, together with the sum of the gradients of
two readers.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import check_bool, check_device, check_floating, check_like
from pyadv.ops.registry import like_first, register
from pyadv.reference.activation import affine_relu_and_sum


def _fake_affine_relu(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    added: Tensor | None,
    slope: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if keep_sum else x.new_empty(0)


_affine_relu = register(
    "affine_relu(Tensor x, Tensor? scale, Tensor? shift, Tensor? added, float slope, "
    "bool keep_sum) -> (Tensor, Tensor)",
    affine_relu_and_sum,
    _fake_affine_relu,
)
_affine_relu_backward = register(
    "affine_relu_backward(Tensor y, Tensor grad, Tensor? other, Tensor? added, Tensor? scale, "
    "float slope) -> Tensor",
    reference.affine_relu_backward,
    like_first,
)


@overload
def affine_relu(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    added: Tensor | None = None,
    slope: float = 0.0,
    keep_sum: Literal[False] = False,
) -> Tensor: ...
@overload
def affine_relu(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    added: Tensor | None = None,
    slope: float = 0.0,
    keep_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def affine_relu(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    added: Tensor | None = None,
    slope: float = 0.0,
    keep_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return relu((x + added) * scale + shift) in one pass: BatchNorm in evaluation mode, or a
    bias, between a residual sum and a ReLU.

    The result has no gradient; `affine_relu_backward` computes that of x and `added`. The sum is
    rounded to the dtype of x, as by PyTorch; the rest is computed in float32 (float64 for float64)
    and rounded once.

    Args:
        x: (B, C, ...) floating, in any layout.
        scale, shift: (C,) of dtype float32 (float64 if x is), or None for 1 and 0.
        added: like x; added before scale and shift.
        slope: the slope below zero, >= 0: of LeakyReLU; 0 is ReLU.
        keep_sum: whether x + added is returned, too.

    Returns:
        y, or (y, x + added); in the layout of x.

    Raises:
        TypeError: not floating tensors of one dtype. ValueError: other shapes or devices, a slope
            that is negative or not finite, or `keep_sum` without `added`.
    """
    op = "affine_relu"
    check_like(op, "x", x, **({} if added is None else {"added": added}))
    _check_channels(op, x, scale=scale, shift=shift)
    _check_slope(op, slope)
    check_bool(op, "keep_sum", keep_sum)
    if keep_sum and added is None:
        raise ValueError(f"{op}: keep_sum needs added, got None: the sum would be x itself")
    y, total = _affine_relu(x, scale, shift, added, slope, keep_sum)
    return (y, total) if keep_sum else y


def affine_relu_backward(
    y: Tensor,
    grad: Tensor,
    other: Tensor | None = None,
    *,
    added: Tensor | None = None,
    scale: Tensor | None = None,
    slope: float = 0.0,
) -> Tensor:
    """Return (grad + other) * relu'(y) * scale + added: the gradient before a ReLU whose result y
    has two readers.

    By default this is (grad + other) * (y > 0), and where y is NaN grad + other. It is computed in
    float32 (float64 for float64) and rounded once. The result has no gradient.

    Args:
        y: (B, C, ...) floating, in any layout: the result of `affine_relu`, or of a ReLU.
        grad, other: like y: gradients of y.
        added: like y: the gradient of (x + added) from elsewhere.
        scale, slope: as in `affine_relu`.

    Returns:
        The gradient of x, in the layout of y.

    Raises:
        TypeError, ValueError: as `affine_relu`.
    """
    op = "affine_relu_backward"
    given = {k: t for k, t in (("other", other), ("added", added)) if t is not None}
    check_like(op, "y", y, grad=grad, **given)
    _check_channels(op, y, scale=scale)
    _check_slope(op, slope)
    return _affine_relu_backward(y, grad, other, added, scale, slope)


def _check_channels(op: str, x: Tensor, **given: Tensor | None) -> None:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in given.items():
        if t is None:
            continue
        check_floating(op, **{name: t})
        if x.dim() < 2:
            raise ValueError(f"{op}: {name} needs channels, dimension 1, got {list(x.shape)}")
        if t.shape != x.shape[1:2]:
            raise ValueError(f"{op}: {name} must have shape [{x.shape[1]}], got {list(t.shape)}")
        if t.dtype != wide:
            raise TypeError(f"{op}: {name} must be {wide} for {x.dtype}, got {t.dtype}")
        check_device(op, name, t, x)


def _check_slope(op: str, slope: float) -> None:
    if isinstance(slope, bool) or not isinstance(slope, (int, float)):
        raise TypeError(f"{op}: slope must be a float, got {type(slope).__name__}")
    if not 0 <= slope < float("inf"):
        raise ValueError(f"{op}: slope must be finite and >= 0, got {slope}")
