"""Winograd convolution with 3x3 windows, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.

Winograd convolution: the algorithm of Toom and Cook multiplies polynomials through their values at
points. It convolves a line of pixels d with a line of taps w as A^T [(G w) * (B^T d)]. At stride 2
the two outer taps meet every second pixel and use five points; the middle tap meets the pixels
between and is multiplied directly. The transpose is split in the same way. Both directions of the
image use the same tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32  # output channels that the kernel computes together
SLOTS = 36  # transformed weights of a pair of channels

_NEAR, _FAR = 5 / 8, 3 / 2  # the points +-near, +-far, infinity, and 0 at stride 1


class _Form(NamedTuple):
    """The matrices that transform tiles of one convolution, and the layout of its tiles."""

    step: int  # input pixels from tile to tile
    from_input: Tensor  # B^T (points, input pixels)
    to_output: Tensor  # A^T (output pixels, points)
    slots: list[int]  # the row of G for each point


def _toom_cook(points: tuple[float, ...], taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return B^T, G and A^T for four outputs, at these points and infinity.

    A row of B^T holds the coefficients of prod (z - q) over the other points; rows of G and columns
    of A^T hold powers of the point.
    """

    def product(roots: list[float]) -> list[float]:
        coefficients = [1.0]
        for q in roots:
            shifted, scaled = [0.0, *coefficients], [*(-q * c for c in coefficients), 0.0]
            coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
        return coefficients

    others = [[q for q in points if q != p] for p in points]
    from_input = [[*product(o), 0.0] for o in others] + [product(list(points))]
    scales = [math.prod(p - q for q in o) for p, o in zip(points, others, strict=True)]
    from_weight = [[p**k / s for k in range(taps)] for p, s in zip(points, scales, strict=True)]
    to_output = [[*(p**k for p in points), float(k == 3)] for k in range(4)]
    from_weight.append([float(k == taps - 1) for k in range(taps)])

    def matrix(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    return matrix(from_input), matrix(from_weight), matrix(to_output)


def _forms() -> tuple[dict[int, Tensor], dict[tuple[int, bool], _Form]]:
    """Return G by stride, and the forms by stride and direction (True for the transpose)."""
    both = (_NEAR, -_NEAR, _FAR, -_FAR)
    from_input, from_weight, to_output = _toom_cook((0.0, *both), 3)
    plain = _Form(4, from_input, to_output, list(range(6)))
    from_five, from_two, to_four = _toom_cook(both, 2)
    every_second = from_two.new_zeros(6, 3)
    every_second[:5, ::2], every_second[5, 1] = from_two, 1.0
    slots = [0, 1, 2, 3, 4, 5, 5, 5, 5]
    nine_in, four_out = from_five.new_zeros(9, 9), torch.cat([to_four, torch.eye(4)], 1)
    nine_in[:5, ::2], nine_in[5:, 1::2] = from_five, torch.eye(4)
    five_in, eight_out = torch.cat([from_five, torch.eye(4, 5)]), from_five.new_zeros(8, 9)
    eight_out[::2, 5:], eight_out[1::2, :5] = torch.eye(4), to_four
    return {1: from_weight, 2: every_second}, {
        (1, False): plain,
        (1, True): plain,
        (2, False): _Form(8, nine_in, four_out, slots),
        (2, True): _Form(4, five_in, eight_out, slots),
    }


_FROM_WEIGHT, _FORMS = _forms()


def winograd_weight(weight: Tensor, transposed: bool = False, stride: int = 1) -> Tensor:
    """Return U = G w G^T in panels. See `ops.winograd_weight`."""
    if transposed:
        weight = weight.flip(2, 3).transpose(0, 1)
    outputs, inputs = weight.shape[:2]
    g = _FROM_WEIGHT[stride].to(weight.device)
    points = (g @ weight.double() @ g.T).to(weight.dtype)
    panels = -(-outputs // PANEL)
    points = F.pad(points.permute(2, 3, 1, 0).flatten(0, 1), (0, panels * PANEL - outputs))
    return points.reshape(SLOTS, inputs, panels, PANEL).permute(2, 0, 1, 3).contiguous()


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
    """Return A^T [sum over channels of U * (B^T d B)] A. See `ops.winograd_conv2d`."""
    height, width = output_size(x.shape[2:], padding, stride)
    after = (bias, added, None, relu)
    return winograd(x, weight, *after, outputs, height, width, padding, stride, False)


def winograd_conv2d_input(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    padding: int,
    stride: int = 1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Apply the transpose of `winograd_conv2d`. See `ops.winograd_conv2d_input`."""
    outside = transposed_padding(padding, stride)
    after = (None, None, mask, False)
    outputs, height, width = shape[1:]
    return winograd(grad, weight, *after, outputs, height, width, outside, stride, True)


def output_size(size: tuple[int, ...], padding: int, stride: int) -> tuple[int, ...]:
    return tuple((s + 2 * padding - 3) // stride + 1 for s in size)


def transposed_padding(padding: int, stride: int) -> int:
    """Return by how many pixels the first tile of the transpose reaches beyond the edge."""
    return 2 - padding if stride == 1 else 0


def winograd(
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
    form = _FORMS[stride, transposed]
    b, a = (m.to(x) for m in (form.from_input, form.to_output))
    (tile, points), patch = a.shape, b.shape[1]
    down, across = -(-height // tile), -(-width // tile)
    below, right = (
        (n - 1) * form.step + patch - s - padding
        for n, s in ((down, x.shape[2]), (across, x.shape[3]))
    )
    padded = F.pad(x, (padding, right, padding, below))
    patches = padded.unfold(2, patch, form.step).unfold(3, patch, form.step)
    v = (b @ patches @ b.T).permute(4, 5, 0, 2, 3, 1).reshape(points**2, -1, x.shape[1])
    slots = [6 * i + j for i in form.slots for j in form.slots]
    u = weight.permute(1, 2, 0, 3).flatten(2)[slots]
    m = (v @ u)[..., :outputs].unflatten(1, (len(x), down, across)).unflatten(0, (points, points))
    y = a @ m.permute(2, 5, 3, 4, 0, 1) @ a.T  # (B, N, down, across, tile, tile)
    y = y.transpose(3, 4).reshape(len(x), outputs, down * tile, across * tile)
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    if added is not None:
        y = y + added
    if relu:
        y = y.relu()
    if mask is not None:
        y = torch.where(mask <= 0, 0.0, y)
    return y.contiguous(memory_format=torch.channels_last)
