"""Back to 8-bit images, without leaving the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.engine import checks
from pyadv.ops.arguments import check_like
from pyadv.tensors import broadcastable, flatten, per_row

LEVELS = 255
_SLACK = 1e-4  # of a grid step: eps = 8 / 255 in floating point is eight steps


def to_uint8(x_adv: Tensor, x: Tensor, eps: float | Tensor, norm: str | float = "Linf") -> Tensor:
    """x_adv on the grid of 8-bit images, no further than eps from x.

    Rounding alone may leave the ball by half a step per element, and truncation by one. In Linf
    each element takes the nearest level within floor(255 eps) levels of x. In L2 and L1 elements
    take the nearest level; a sample that leaves the ball by this is rounded towards x instead.

    Args:
        x_adv: (B, ...) adversarial examples within eps of x, in [0, 1].
        x: (B, ...) the images they come from, multiples of 1/255.
        eps: radius, in units of x; float, per sample (B,), or (Linf) broadcastable to x.
        norm: "Linf", "L2" or "L1".

    Returns:
        (B, ...) uint8.

    Raises:
        TypeError, ValueError: for shapes, dtypes, an eps that is no radius, an x that is not an
            8-bit image, or an x_adv outside the box or the ball.
    """
    norm = checks.canonical_norm(norm)
    checks.size("eps", eps)
    check_like("to_uint8", "x_adv", x_adv, x=x)
    checks.parameters(x, {"eps": eps})
    image, adv = LEVELS * x.double(), LEVELS * x_adv.double()
    level = image.round()
    # As far as its dtype can hold multiples of 1/255, and a little for arithmetic on the way.
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
            length = torch.linalg.vector_norm(flatten(d), order, dim=1)
            return per_row(length, d) <= radius

        move = torch.where(fits(move.round()), move.round(), move.trunc())
        inside = bool(fits(move).all())
    if not inside:
        raise ValueError(f"to_uint8: x_adv must lie within eps of x in {norm}")
    return (level + move).to(torch.uint8)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """NaN is near nothing."""
    return bool(((a - b).abs() <= tolerance).all())
