"""Soft thresholding."""

from __future__ import annotations

from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import check_like, row_parameter, run_out
from pyadv.ops.registry import like_first, register_out

_shrink = register_out("shrink(Tensor x, Tensor threshold) -> Tensor", reference.shrink, like_first)


def shrink(x: Tensor, threshold: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    """Move every element towards 0 by `threshold`, and to 0 if its magnitude is smaller.

    Equals `reference.shrink` bit for bit; a NaN stays.

    Args:
        x: (B, ...), any floating dtype and memory layout.
        threshold: >= 0; a float or (B,).
        out: tensor to write to; `out=x` works in place.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: threshold is negative or has another shape, or `out` overlaps x.

    Source: Donoho, "De-noising by soft-thresholding" (IEEE Transactions on Information Theory,
    1995).
    """
    check_like("shrink", "x", x)
    limit = row_parameter("shrink", "threshold", threshold, x, nonnegative=True)
    return run_out(*_shrink, (x, limit), out)
