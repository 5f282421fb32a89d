"""Rounding of adversarial examples to 8-bit images that stay within the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.menus import Norm
from pyadv.ops.arguments import check_like
from pyadv.tensors import broadcastable, per_row, row_norm

LEVELS = 255
_SLACK = 1e-4  # grid steps added to the radius, so that a rounded 8 / 255 counts as eight steps


def to_uint8(x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: Norm | float = "Linf") -> Tensor:
    """Round x_adv to the grid of 8-bit images, at most eps away from x.

    Rounding alone may leave the ball by half a step per element, and truncation by one step. In
    Linf each element takes the nearest level within floor(255 eps) levels of x. In L2 and L1 each
    element takes the nearest level; a sample that would leave the ball is rounded towards x.

    Args:
        x_adv: (B, ...) adversarial examples within eps of x, in [0, 1].
        x: (B, ...) the images they come from, multiples of 1/255.
        eps: radius, in units of x; float, per sample (B,), or (Linf) broadcastable to x.
        norm: "Linf", "L2" or "L1".

    Returns:
        (B, ...) uint8.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, eps is not a radius, x is not an 8-bit
            image, or x_adv lies outside the box or the ball.
    """
    norm = checks.canonical_norm(norm)
    checks.size("eps", eps)
    check_like("to_uint8", "x_adv", x_adv, x=x)
    checks.parameters(x, {"eps": eps})
    image, adv = LEVELS * x.double(), LEVELS * x_adv.double()
    level = image.round()
    # The rounding error of multiples of 1/255 in this dtype, with a margin for later arithmetic.
    tolerance = LEVELS * 4 * torch.finfo(x.dtype).eps
    if not _near(image, level, tolerance) or not _near(level, level.clamp(0, LEVELS), 0):
        raise ValueError("to_uint8: x must be an 8-bit image divided by 255")
    if not _near(adv, adv.clamp(0, LEVELS), tolerance):
        raise ValueError("to_uint8: x_adv must lie in [0, 1]")
    radius = LEVELS * broadcastable(eps, image) + _SLACK
    move = (adv - level).clamp(-level, LEVELS - level)
    if norm == "Linf":
        most = radius.floor()
        inside = _near(move, move.clamp(-radius, radius), tolerance)
        move = move.round().clamp(-most, most)
    else:
        order = 2 if norm == "L2" else 1

        def fits(d: Tensor) -> Tensor:
            length = row_norm(d, order)
            return per_row(length, d) <= radius

        move = torch.where(fits(move.round()), move.round(), move.trunc())
        inside = bool(fits(move).all())
    if not inside:
        raise ValueError(f"to_uint8: x_adv must lie within eps of x in {norm}")
    return (level + move).to(torch.uint8)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether all elements are within the tolerance; NaN never is."""
    return bool(((a - b).abs() <= tolerance).all())
