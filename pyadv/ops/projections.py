"""Projections onto a norm ball around x and onto the box [lo, hi], without gradient.

All take (B, ...) tensors of one floating dtype, in any memory layout. `eps` is a float or holds one
value per sample (for `linf_project` it may be any shape that broadcasts to x); `lo` and `hi` are
floats or tensors that broadcast to x, `None` leaves that side open. `out=` writes the result into a
tensor, which may be `x_adv` itself. Common errors:

    TypeError: not floating-point tensors, or of different dtypes.
    ValueError: shapes or devices differ, eps < 0, lo > hi, NaN parameters, or `out` shares memory
        with an input without being the same tensor.
"""

from __future__ import annotations

from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import box_parameters, check_like, parameter, row_parameter, run_out
from pyadv.ops.registry import like_first, register_out

_BALL_AND_BOX = "Tensor x_adv, Tensor x, Tensor eps, Tensor? lo, Tensor? hi"

_linf_project = register_out(
    f"linf_project({_BALL_AND_BOX}) -> Tensor", reference.linf_project, like_first
)
_l2_project = register_out(
    f"l2_project({_BALL_AND_BOX}, bool exact) -> Tensor", reference.l2_project, like_first
)
_l1_project = register_out(
    f"l1_project({_BALL_AND_BOX}) -> Tensor", reference.l1_project, like_first
)


def linf_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return min(max(x_adv, x - eps), x + eps), clipped to the box.

    That is the nearest point of ball and box if x lies in the box.

    Equals `reference.linf_project` bit for bit; a NaN stays.
    """
    check_like("linf_project", "x_adv", x_adv, x=x)
    radius = parameter("linf_project", "eps", eps, x, nonnegative=True)
    args = (x_adv, x, radius, *box_parameters("linf_project", x, lo, hi))
    return run_out(*_linf_project, args, out)


def l2_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    exact: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return x + (x_adv - x) min(1, eps / ||x_adv - x||), clipped to the box, per sample.

    The result lies in ball and box if x lies in the box; otherwise the box wins. A row inside
    the ball is only clipped. Norms are right for entries of any size.

    Args:
        exact: the Euclidean projection onto the intersection of ball and box instead, which is
            x + t (x_adv - x) clipped to the box, with the largest t <= 1 that stays in the ball.
            Parts of x outside the box count as if they lay on its border.
    """
    check_like("l2_project", "x_adv", x_adv, x=x)
    radius = row_parameter("l2_project", "eps", eps, x, nonnegative=True)
    args = (x_adv, x, radius, *box_parameters("l2_project", x, lo, hi), exact)
    return run_out(*_l2_project, args, out)


def l1_project(
    x_adv: Tensor,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return the Euclidean projection onto the intersection of L1 ball and box, per sample.

    It is x + sign(d) min(max(|d| - threshold, 0), room) for d = x_adv - x, where room is the
    distance from x to the box on that side (0 if x itself is outside: then the box wins). The
    threshold makes the L1 norm eps; a few linear passes find it, without a sort.

    Source: Croce and Hein, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image
    Classifiers" (ICML 2021), section 2.
    """
    check_like("l1_project", "x_adv", x_adv, x=x)
    radius = row_parameter("l1_project", "eps", eps, x, nonnegative=True)
    args = (x_adv, x, radius, *box_parameters("l1_project", x, lo, hi))
    return run_out(*_l1_project, args, out)
