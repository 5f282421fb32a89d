"""Steps of projected-gradient attacks: one launch from an iterate to the next, inside ball and box.

All take float16, bfloat16, float32 or float64 tensors of any memory layout, (B, ...) with the
samples in the first dimension. `alpha`, `eps`, `lo` and `hi` are floats or tensors: 1-D of length B
is per sample, any other shape must broadcast to x (per channel: (1, C, 1, 1)); `lo=None` or
`hi=None` leaves that side of the box open. Rows where `active` (B,) is False come back bit for bit.
`out=` writes the result into a tensor, which may be `x_adv` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops._arguments import check_like, check_rows, run_out, step_parameters
from pyadv.ops._registry import like_first, register_out

_BOX_AND_MASK = "Tensor? lo, Tensor? hi, Tensor? active"

_linf_step = register_out(
    f"linf_step(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, {_BOX_AND_MASK})"
    " -> Tensor",
    reference.linf_step,
    like_first,
)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One signed-gradient step: min(max(x_adv + alpha sign(grad), x - eps), x + eps), then the box.

    A NaN element of the gradient does not move, an infinite one moves by its sign. The result
    equals `reference.linf_step` bit for bit.

    Args:
        x_adv: current iterate, (B, ...).
        grad: gradient of the loss to be maximised with respect to x_adv, same shape and dtype.
        x: clean input, the centre of the ball, same shape and dtype.
        alpha: step size, in units of x.
        eps: radius of the Linf ball, >= 0, in units of x.
        lo, hi: the box.
        active: (B,) bool; rows that are False stay as they are.
        out: where to write; `out=x_adv` steps in place.

    Raises:
        TypeError: not floating-point tensors, or of different dtypes.
        ValueError: shapes or devices differ, eps < 0, lo > hi, NaN parameters, or `out` shares
            memory with an input without being the same tensor.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR
    2018), section 2.1.
    """
    check_like("linf_step", "x_adv", x_adv, grad=grad, x=x)
    if active is not None:
        check_rows("linf_step", "active", active, x_adv, torch.bool)
    args = (x_adv, grad, x, *step_parameters("linf_step", x, alpha, eps, lo, hi), active)
    return run_out(*_linf_step, args, out)
