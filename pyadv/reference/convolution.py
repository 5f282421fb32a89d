"""Winograd's convolution F(4x4, 3x3), in plain PyTorch. Functions of `pyadv.ops` of the same name
have the same arguments; the tests hold the kernels against what stands here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, PATCH = 4, 6  # outputs and inputs per side of a tile
PANEL = 32  # output channels that the kernel computes together

_NEAR, _FAR = 5 / 8, 3 / 2  # evaluated at 0, +-near, +-far and infinity


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6) by Toom and Cook: rows of B^T are the coefficients of
    prod (z - q) over the other points q, those of G and columns of A^T powers of the points."""
    a, b = _NEAR, _FAR
    points, others = (0.0, a, -a, b, -b), (a * a + b * b, a * a * b * b)
    from_input = [
        [others[1], 0, -others[0], 0, 1, 0],
        *([0, -p * q * q, -q * q, p, 1, 0] for p, q in ((a, b), (-a, b), (b, a), (-b, a))),
        [0, others[1], 0, -others[0], 0, 1],
    ]
    from_weight, to_output = [], []
    for p in points:
        scale = 1.0
        for q in points:
            scale *= p - q if p != q else 1.0
        from_weight.append([p**k / scale for k in range(3)])
        to_output.append([p**k for k in range(TILE)])
    from_weight.append([0, 0, 1])
    to_output.append([0] * (TILE - 1) + [1])
    matrices = (from_input, from_weight, list(zip(*to_output, strict=True)))
    return tuple(torch.tensor(m, dtype=torch.float64) for m in matrices)


_FROM_INPUT, _FROM_WEIGHT, _TO_OUTPUT = _matrices()


def winograd_weight(weight: Tensor, transposed: bool = False) -> Tensor:
    """U = G w G^T in panels. See `ops.winograd_weight`."""
    if transposed:
        weight = weight.flip(2, 3).transpose(0, 1)
    outputs, inputs = weight.shape[:2]
    g = _FROM_WEIGHT.to(weight.device)
    points = (g @ weight.double() @ g.T).to(weight.dtype)
    panels = -(-outputs // PANEL)
    points = F.pad(points.permute(2, 3, 1, 0).flatten(0, 1), (0, panels * PANEL - outputs))
    return points.reshape(PATCH**2, inputs, panels, PANEL).permute(2, 0, 1, 3).contiguous()


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, padding: int
) -> Tensor:
    """A^T [sum over channels of U * (B^T d B)] A. See `ops.winograd_conv2d`."""
    height, width = (s + 2 * padding - 2 for s in x.shape[2:])
    down, across = -(-height // TILE), -(-width // TILE)
    right, below = (
        t * TILE + 2 - s - padding for t, s in ((across, x.shape[3]), (down, x.shape[2]))
    )
    padded = F.pad(x, (padding, right, padding, below))
    patches = padded.unfold(2, PATCH, TILE).unfold(3, PATCH, TILE)  # (B, C, down, across, 6, 6)
    b, a = (m.to(x) for m in (_FROM_INPUT, _TO_OUTPUT))
    v = (b @ patches @ b.T).permute(4, 5, 0, 2, 3, 1).reshape(PATCH**2, -1, x.shape[1])
    u = weight.permute(1, 2, 0, 3).flatten(2)
    m = (v @ u)[..., :outputs].unflatten(1, (len(x), down, across)).unflatten(0, (PATCH, PATCH))
    y = a @ m.permute(2, 5, 3, 4, 0, 1) @ a.T  # (B, N, down, across, 4, 4)
    y = y.transpose(3, 4).reshape(len(x), outputs, down * TILE, across * TILE)
    y = y[:, :, :height, :width]
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.contiguous(memory_format=torch.channels_last)
