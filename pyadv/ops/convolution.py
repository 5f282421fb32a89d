"""Winograd's convolution of 3x3 windows: a quarter of the multiplications.

An output tile of 4x4 pixels takes 36 products per pair of channels instead of 144, between the
transformed input and the transformed weight, and is transformed back. The weight is transformed
once, by `winograd_weight`; four times as large then, it serves any number of calls.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), the form
F(4x4, 3x3), but evaluated at 0, +-5/8, +-3/2 and infinity: the rounding error is less than half of
that at their 0, +-1, +-2. On the choice of points: Barabasz et al., "Error Analysis and Improving
the Accuracy of Winograd Convolution for Deep Neural Networks" (ACM TOMS 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops._arguments import check_device
from pyadv.ops._registry import register
from pyadv.reference.convolution import PANEL, PATCH


def _fake_weight(weight: Tensor, transposed: bool) -> Tensor:
    outputs, inputs = weight.shape[:2]
    if transposed:
        outputs, inputs = inputs, outputs
    return weight.new_empty(-(-outputs // PANEL), PATCH**2, inputs, PANEL)


def _fake_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, padding: int
) -> Tensor:
    height, width = (s + 2 * padding - 2 for s in x.shape[2:])
    shape = (x.shape[0], outputs, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_winograd_weight = register(
    "winograd_weight(Tensor weight, bool transposed) -> Tensor",
    reference.winograd_weight,
    _fake_weight,
)
_winograd_conv2d = register(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, int outputs, int padding) -> Tensor",
    reference.winograd_conv2d,
    _fake_conv2d,
)


def winograd_weight(weight: Tensor, transposed: bool = False) -> Tensor:
    """The weight of a convolution as `winograd_conv2d` takes it: U = G w G^T, float32.

    Args:
        weight: (N, C, 3, 3) float32, of any layout.
        transposed: for the transposed convolution, from N channels to C, which is the input
            gradient of the convolution: the window is turned by half a circle.

    Returns:
        (ceil(N / 32), 36, C, 32): panels of 32 output channels, the last one padded with zeros; for
        each point and each input channel. With `transposed`, C and N change places.

    Raises:
        TypeError: not a float32 tensor. ValueError: another shape.
    """
    _check_float32("winograd_weight", "weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(
            f"winograd_weight: weight must have shape [N, C, 3, 3], got {list(weight.shape)}"
        )
    return _winograd_weight(weight.detach(), transposed)


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, padding: int
) -> Tensor:
    """`conv2d` of stride 1 with 3x3 windows and zero padding; gives no gradient.

    The input gradient of a convolution with padding p is the transposed one with padding 2 - p:
    `winograd_conv2d(grad, winograd_weight(w, transposed=True), None, C, 2 - p)`.

    Rounding errors are about five times those of `conv2d`: 1e-6 of the outputs' standard deviation
    on 128 channels. A sample's result depends neither on the batch it is in nor on the number of
    threads. A NaN or an infinity in the input reaches all outputs of its tiles.

    Args:
        x: (B, C, H, W) float32; channels-last is read as it is, other layouts are copied.
        weight: from `winograd_weight`.
        bias: (N,) float32, or None.
        outputs: N, the number of output channels.
        padding: zeros on each side, >= 0.

    Returns:
        (B, N, H + 2 padding - 2, W + 2 padding - 2), channels-last.

    Raises:
        TypeError: not float32 tensors. ValueError: shapes that do not fit each other, other
            devices, or an image smaller than the window.
    """
    op = "winograd_conv2d"
    _check_float32(op, "x", x)
    _check_float32(op, "weight", weight)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape [B, C, H, W], got {list(x.shape)}")
    expected = [-(-outputs // PANEL), PATCH**2, x.shape[1], PANEL]
    if list(weight.shape) != expected:
        raise ValueError(
            f"{op}: weight must be what winograd_weight made for {x.shape[1]} input and {outputs} "
            f"output channels, of shape {expected}, got {list(weight.shape)}"
        )
    if padding < 0 or min(x.shape[2:]) + 2 * padding < 3:
        raise ValueError(
            f"{op}: padding must be >= 0 and make the image at least 3x3, "
            f"got {padding} for {list(x.shape[2:])}"
        )
    check_device(op, "weight", weight, x)
    if bias is not None:
        _check_float32(op, "bias", bias)
        if bias.shape != (outputs,):
            raise ValueError(f"{op}: bias must have shape [{outputs}], got {list(bias.shape)}")
        check_device(op, "bias", bias, x)
    return _winograd_conv2d(x, weight, bias, outputs, padding)


def _check_float32(op: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: {name} must be a float32 tensor, got {got}")
