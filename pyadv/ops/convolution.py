"""Winograd convolution with 3x3 windows.

It takes a quarter of the multiplications of a direct convolution, at stride 2 0.56 of them.

`winograd_weight` transforms the weight once, to four times its size, for any number of calls. An
output tile of 4x4 pixels takes 36 products of the transformed input and the transformed weight per
pair of channels (81 at stride 2) instead of 144. The products are then transformed back.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), the form
F(4x4, 3x3), but evaluated at 0, +-5/8, +-3/2 and infinity: the rounding error is less than half of
that at their points 0, +-1, +-2. The choice of points follows Barabasz et al., "Error Analysis and
Improving the Accuracy of Winograd Convolution for Deep Neural Networks" (ACM TOMS 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import check_bool, check_device, check_strided
from pyadv.ops.registry import register
from pyadv.reference.convolution import (
    PANEL,
    SLOTS,
    output_size,
    transposed_padding,
    winograd,
)


def _fake_weight(weight: Tensor, transposed: bool, stride: int) -> Tensor:
    outputs, inputs = weight.shape[:2]
    if transposed:
        outputs, inputs = inputs, outputs
    return weight.new_empty(-(-outputs // PANEL), SLOTS, inputs, PANEL)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    mask: Tensor | None,
    relu: bool,
    outputs: int,
    height: int,
    width: int,
    padding: int,
    stride: int,
    transposed: bool,
) -> Tensor:
    shape = (x.shape[0], outputs, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_winograd_weight = register(
    "winograd_weight(Tensor weight, bool transposed, int stride) -> Tensor",
    reference.winograd_weight,
    _fake_weight,
)
_winograd = register(
    "winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? added, Tensor? mask, bool relu, "
    "int outputs, int height, int width, int padding, int stride, bool transposed) -> Tensor",
    winograd,
    _fake,
)


def winograd_weight(weight: Tensor, transposed: bool = False, stride: int = 1) -> Tensor:
    """Return the weight as `winograd_conv2d` takes it: U = G w G^T, computed in float64 and rounded
    once.

    Args:
        weight: (N, C, 3, 3) float32, of any layout.
        transposed: whether the weight is for `winograd_conv2d_input`: input and output channels
            change places, and the window is rotated by 180 degrees.
        stride: the stride of the convolution, 1 or 2.

    Returns:
        (ceil(N / 32), 36, C, 32): panels of 32 output channels, the last one padded with zeros,
        for each of 36 products and each input channel. With `transposed`, C and N change places.

    Raises:
        TypeError: not a float32 tensor. ValueError: another shape or stride.
    """
    op = "winograd_weight"
    _check_float32(op, weight=weight)
    _check_stride(op, stride)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"{op}: weight must have shape [N, C, 3, 3], got {list(weight.shape)}")
    check_bool(op, "transposed", transposed)
    return _winograd_weight(weight.detach(), transposed, stride)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    padding: int,
    stride: int = 1,
    *,
    added: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return `conv2d` with 3x3 windows and zero padding, optionally followed by a sum and a ReLU.

    The result has no gradient.

    Rounding errors are about five times those of `conv2d`: 1e-6 of the outputs' standard deviation
    on 128 channels. The result of a sample depends neither on its batch nor on the number of
    threads. A NaN or an infinity in the input reaches all outputs of its tiles.

    Args:
        x: (B, C, H, W) float32; channels-last is read in place, other layouts are copied.
        weight: from `winograd_weight`, with the same stride.
        bias: (N,) float32, or None.
        outputs: N, the number of output channels.
        padding: zeros on each side, >= 0; at stride 2 it must be 1.
        stride: 1 or 2.
        added: (B, N, H', W') float32, added to the result.
        relu: whether negative results are set to 0, after the sum.

    Returns:
        (B, N, H', W'), channels-last, where H' and W' are those of `conv2d`.

    Raises:
        TypeError: not float32 tensors. ValueError: shapes that do not fit each other, other
            devices, another stride or padding, or an image smaller than the window.
    """
    op = "winograd_conv2d"
    _check(op, "x", x, weight, outputs, stride)
    _check_padding(op, padding, stride)
    if padding < 0 or min(x.shape[2:]) + 2 * padding < 3:
        raise ValueError(
            f"{op}: padding must be >= 0 and make the image at least 3x3, "
            f"got {padding} for {list(x.shape[2:])}"
        )
    if bias is not None:
        _check_shape(op, "bias", bias, (outputs,), x)
    check_bool(op, "relu", relu)
    size = output_size(x.shape[2:], padding, stride)
    if added is not None:
        _check_shape(op, "added", added, (x.shape[0], outputs, *size), x)
    after = (bias, added, None, relu)
    return _winograd(x, weight, *after, outputs, *size, padding, stride, False)


def winograd_conv2d_input(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    stride: int = 1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the gradient of `winograd_conv2d` with respect to its input, as
    `torch.nn.grad.conv2d_input` does.

    Args:
        grad: (B, N, H', W') float32, the gradient of the output.
        weight: from `winograd_weight` with `transposed`, and with the same stride.
        shape: (B, C, H, W), the shape of the input.
        padding, stride: those of the convolution; padding is 0, 1 or 2, and 1 at stride 2.
        mask: (B, C, H, W) float32; where it is not positive, the result is 0. If a ReLU made
            the input of the convolution, its output as mask gives the gradient before the ReLU.

    Returns:
        (B, C, H, W), channels-last.

    Raises:
        TypeError, ValueError: as `winograd_conv2d`.
    """
    op = "winograd_conv2d_input"
    if not isinstance(shape, Sequence) or len(shape) != 4:
        raise ValueError(f"{op}: shape must be four integers (B, C, H, W), got {shape!r}")
    for n in shape:
        _check_int(op, "shape", n)
    _check(op, "grad", grad, weight, shape[1], stride)
    _check_padding(op, padding, stride)
    if padding not in (0, 1, 2):
        raise ValueError(f"{op}: padding must be 0, 1 or 2, got {padding}")
    size = output_size(tuple(shape[2:]), padding, stride)
    if (grad.shape[0], *grad.shape[2:]) != (shape[0], *size):
        raise ValueError(
            f"{op}: grad must have shape {[shape[0], grad.shape[1], *size]} for an input of "
            f"{list(shape)}, got {list(grad.shape)}"
        )
    if mask is not None:
        _check_shape(op, "mask", mask, shape, grad)
    outside = transposed_padding(padding, stride)
    after = (None, None, mask, False)
    return _winograd(grad, weight, *after, *shape[1:], outside, stride, True)


def _check(op: str, name: str, x: Tensor, weight: Tensor, outputs: int, stride: int) -> None:
    _check_float32(op, **{name: x, "weight": weight})
    _check_stride(op, stride)
    _check_int(op, "outputs", outputs)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must have four dimensions, got {list(x.shape)}")
    expected = [-(-outputs // PANEL), SLOTS, x.shape[1], PANEL]
    if list(weight.shape) != expected:
        raise ValueError(
            f"{op}: weight must be what winograd_weight made for {x.shape[1]} input and {outputs} "
            f"output channels, of shape {expected}, got {list(weight.shape)}"
        )
    check_device(op, "weight", weight, x)


def _check_shape(op: str, name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    _check_float32(op, **{name: t})
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(t.shape)}")
    check_device(op, name, t, x)


def _check_stride(op: str, stride: int) -> None:
    _check_int(op, "stride", stride)
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {stride}")


def _check_padding(op: str, padding: int, stride: int) -> None:
    _check_int(op, "padding", padding)
    if stride == 2 and padding != 1:
        raise ValueError(f"{op}: at stride 2 padding must be 1, got {padding}")


def _check_int(op: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not isinstance(value, torch.SymInt) and not -(2**31) < value < 2**31:
        raise ValueError(f"{op}: {name} must be less than 2^31, got {value}")


def _check_float32(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.dtype != torch.float32:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{op}: {name} must be a float32 tensor, got {got}")
        check_strided(op, name, t)
