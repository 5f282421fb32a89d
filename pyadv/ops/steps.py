"""Steps of projected-gradient attacks: one launch computes the next iterate, inside ball and box.

All take float16, bfloat16, float32 or float64 tensors of any memory layout, (B, ...) with the
samples in the first dimension, and have no gradient. `alpha`, `eps`, `lo` and `hi` are floats or
tensors: 1-D of length B is per sample, any other shape must broadcast to x (per channel:
(1, C, 1, 1)); `lo=None` or `hi=None` leaves that side of the box open. The L2 and L1 steps work on
whole rows: their `alpha` and `eps` are floats or per sample. Rows where `active` (B,) is False are
returned bit for bit. `out=` writes the result into a tensor, which may be `x_adv` itself. Common
errors:

    TypeError: not floating-point tensors, or of different dtypes.
    ValueError: shapes or devices differ, eps < 0, lo > hi, NaN parameters, or `out` shares memory
        with an input without being the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyadv import reference
from pyadv.menus import AnyNorm
from pyadv.ops.arguments import (
    box_parameters,
    check_device,
    check_like,
    check_rows,
    check_strided,
    parameter,
    refuse_overlap,
    row_parameter,
    run_out,
)
from pyadv.ops.registry import like_first, no_output, register, register_out

_ELEMENTWISE = ("linf_step", "linf_momentum_step", "square_step")  # alpha and eps of any shape
_STEP = "Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps"
_MOMENTUM_STEP = (
    "Tensor x_adv, Tensor x_prev, Tensor grad, Tensor x, Tensor alpha, Tensor eps, Tensor momentum"
)
_BOUNDARY_STEP = "Tensor x_adv, Tensor grad, Tensor x, Tensor value, Tensor share, Tensor overshoot"
_BOX_AND_MASK = "Tensor? lo, Tensor? hi, Tensor? active"

_linf_step = register_out(
    f"linf_step({_STEP}, {_BOX_AND_MASK}) -> Tensor", reference.linf_step, like_first
)
_l2_step = register_out(
    f"l2_step({_STEP}, {_BOX_AND_MASK}) -> Tensor", reference.l2_step, like_first
)
_l1_step = register_out(
    f"l1_step({_STEP}, {_BOX_AND_MASK}, Tensor keep) -> Tensor", reference.l1_step, like_first
)
_linf_momentum_step = register_out(
    f"linf_momentum_step({_MOMENTUM_STEP}, {_BOX_AND_MASK}) -> Tensor",
    reference.linf_momentum_step,
    like_first,
)
_l2_momentum_step = register_out(
    f"l2_momentum_step({_MOMENTUM_STEP}, {_BOX_AND_MASK}) -> Tensor",
    reference.l2_momentum_step,
    like_first,
)
_linf_boundary_step = register_out(
    f"linf_boundary_step({_BOUNDARY_STEP}, {_BOX_AND_MASK}) -> Tensor",
    reference.linf_boundary_step,
    like_first,
)
_l2_boundary_step = register_out(
    f"l2_boundary_step({_BOUNDARY_STEP}, {_BOX_AND_MASK}) -> Tensor",
    reference.l2_boundary_step,
    like_first,
)
_square_step = register_out(
    "square_step(Tensor x_adv, Tensor x_best, Tensor x, Tensor u, int side, "
    f"Tensor eps, {_BOX_AND_MASK}) -> Tensor",
    reference.square_step,
    like_first,
)
_keep_rows = register(
    "keep_rows_(Tensor mask, Tensor x, Tensor grad, Tensor(a!) x_best, Tensor(b!) grad_best) -> ()",
    reference.keep_rows_,
    no_output,
)
_keep_best = register(
    "keep_best_(Tensor loss, Tensor x, Tensor? grad, Tensor(a!) loss_best, Tensor(b!) x_best, "
    "Tensor(c!)? grad_best) -> ()",
    reference.keep_best_,
    no_output,
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
    """Take a signed-gradient step: min(max(x_adv + alpha sign(grad), x - eps), x + eps), then box.

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
        out: tensor to write to; `out=x_adv` steps in place.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR
    2018), section 2.1.
    """
    _check("linf_step", x_adv, active, grad=grad, x=x)
    parameters = _parameters("linf_step", x, alpha, eps, lo, hi)
    return run_out(*_linf_step, (x_adv, grad, x, *parameters, active), out)


def l2_step(
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
    """Take a normalised-gradient step, x_adv + alpha grad / ||grad||, then the L2 ball and the box.

    A row moves by alpha for any size of its gradient (there is no additive epsilon), and does not
    move if the gradient is zero. A row whose gradient has a NaN or an infinity is returned bit for
    bit. Arguments as in `linf_step`; `alpha` and `eps` are floats or (B,).

    Source: Madry et al. (ICLR 2018), appendix; projection as in `l2_project`.
    """
    _check("l2_step", x_adv, active, grad=grad, x=x)
    parameters = _parameters("l2_step", x, alpha, eps, lo, hi)
    return run_out(*_l2_step, (x_adv, grad, x, *parameters, active), out)


def l1_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    keep: float | Tensor = 0.2,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Move the `count` entries of largest |grad| by alpha sign(grad) / count, then `l1_project`.

    A row thus moves by alpha in the L1 norm if neither ball nor box binds.

    A row keeps the entries of at least the |grad| of rank floor((1 - keep) n) from below, ties
    included, zeros excluded. A row whose gradient has a NaN or an infinity is returned bit for bit.

    Args:
        keep: fraction of the n entries of a row to move, in [0, 1] (at least one moves); a float
            or (B,). The other arguments are those of `linf_step`; `alpha` and `eps` are floats or
            (B,).

    Source: Croce and Hein, "Mind the Box: l1-APGD" (ICML 2021), section 3.1; rank as in the
    authors' code.
    """
    _check("l1_step", x_adv, active, grad=grad, x=x)
    parameters = _parameters("l1_step", x, alpha, eps, lo, hi)
    kept = row_parameter("l1_step", "keep", keep, x, fraction=True)
    return run_out(*_l1_step, (x_adv, grad, x, *parameters, active, kept), out)


_IN_PLACE: dict[AnyNorm, torch._ops.OpOverload] = {
    "Linf": _linf_step[1],
    "L2": _l2_step[1],
    "L1": _l1_step[1],
}


def stepper(
    norm: AnyNorm,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
    keep: float | Tensor,
) -> Callable[[Tensor, Tensor, Tensor | None], None]:
    """Return a function of (x_adv, grad, active) that takes this norm's step in place.

    The parameters are checked here, once. The function does not check that x_adv and grad are like
    x and share no memory.
    """
    op = _IN_PLACE[norm]
    name = f"{norm.lower()}_step"
    parameters = _parameters(name, x, alpha, eps, lo, hi)
    more = (row_parameter(name, "keep", keep, x, fraction=True),) if norm == "L1" else ()

    def step(x_adv: Tensor, grad: Tensor, active: Tensor | None) -> None:
        op(x_adv, grad, x, *parameters, active, *more, x_adv)
        torch.autograd.graph.increment_version(x_adv)

    return step


def linf_momentum_step(
    x_adv: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Take APGD's step: P(x_adv + momentum (z - x_adv) + (1 - momentum) (x_adv - x_prev)).

    Here z = P(x_adv + alpha sign(grad)), and P is `linf_project`.

    Args:
        x_prev: the iterate before x_adv. `out` may be x_prev.
        momentum: weight of the new step, in [0, 1]; APGD uses 0.75, and 1 at its first iteration.
            The other arguments are those of `linf_step`.

    Source: Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
    Diverse Parameter-free Attacks" (ICML 2020), algorithm 1.
    """
    _check("linf_momentum_step", x_adv, active, x_prev=x_prev, grad=grad, x=x)
    alpha, eps, *box = _parameters("linf_momentum_step", x, alpha, eps, lo, hi)
    weight = row_parameter("linf_momentum_step", "momentum", momentum, x, fraction=True)
    args = (x_adv, x_prev, grad, x, alpha, eps, weight, *box, active)
    return run_out(*_linf_momentum_step, args, out)


def l2_momentum_step(
    x_adv: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Take APGD's step with z = P(x_adv + alpha grad / ||grad||); P is `l2_project`, not exact.

    Gradients are treated as in `l2_step`, the arguments are those of `linf_momentum_step`; `alpha`
    and `eps` are floats or (B,).
    """
    _check("l2_momentum_step", x_adv, active, x_prev=x_prev, grad=grad, x=x)
    alpha, eps, *box = _parameters("l2_momentum_step", x, alpha, eps, lo, hi)
    weight = row_parameter("l2_momentum_step", "momentum", momentum, x, fraction=True)
    args = (x_adv, x_prev, grad, x, alpha, eps, weight, *box, active)
    return run_out(*_l2_momentum_step, args, out)


def linf_boundary_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    value: float | Tensor,
    share: float | Tensor,
    overshoot: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Take a step of the fast adaptive boundary attack.

    It moves x_adv and x onto the hyperplane where a linear function is zero and returns a point
    between the two. Let d(p) be the smallest offset in the norm by which p reaches the hyperplane
    inside the box (or gets as near as the box allows), and
    s = min(|d(x_adv)| / (|d(x_adv)| + |d(x)|), share). The result is
    (1 - s) (x_adv + overshoot d(x_adv)) + s (x + overshoot d(x)), clipped to the box. An entry
    whose gradient is 0, or about 1e18 times smaller than the row's largest, does not move.

    Args:
        grad: gradient of the linear function. A row with an entry that is not finite is
            returned bit for bit.
        value: the linear function's value at x_adv; a float or (B,).
        share: upper limit of the weight of x, in [0, 1]; a float or (B,).
        overshoot: factor on the offset, 1 ends at the hyperplane; a float >= 0 or (B,). The other
            arguments are those of `linf_step`.

    Source: Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
    Attack" (ICML 2020), equations 4 and 9.
    """
    args = _boundary_args(
        "linf_boundary_step", x_adv, grad, x, value, share, overshoot, lo, hi, active
    )
    return run_out(*_linf_boundary_step, args, out)


def l2_boundary_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    value: float | Tensor,
    share: float | Tensor,
    overshoot: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Take a step of the fast adaptive boundary attack in L2. See `linf_boundary_step`."""
    args = _boundary_args(
        "l2_boundary_step", x_adv, grad, x, value, share, overshoot, lo, hi, active
    )
    return run_out(*_l2_boundary_step, args, out)


def _boundary_args(
    op: str,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    value: float | Tensor,
    share: float | Tensor,
    overshoot: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
    active: Tensor | None,
) -> tuple[Tensor | None, ...]:
    _check(op, x_adv, active, grad=grad, x=x)
    return (
        *(x_adv, grad, x, row_parameter(op, "value", value, x)),
        row_parameter(op, "share", share, x, fraction=True),
        row_parameter(op, "overshoot", overshoot, x, nonnegative=True),
        *(*box_parameters(op, x, lo, hi), active),
    )


def square_step(
    x_adv: Tensor,
    x_best: Tensor,
    x: Tensor,
    u: Tensor,
    side: int,
    eps: float | Tensor,
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
    active: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Propose Square Attack's next point: x_best with one square of each image changed.

    In the square every channel moves to the border of the Linf ball, x - eps or x + eps, clipped to
    the box.

    The square's first row is floor(u_0 (H - side + 1)), its first column floor(u_1 (W - side + 1)),
    and channel c goes up where u_{2 + c} >= 1/2. In it the result is `linf_step(x_best, +-1, x,
    2 eps, eps)`; elsewhere it is x_best, bit for bit.

    Args:
        x_adv: values of the rows that are not active; images (B, C, H, W) of less than 2^31
            elements.
        x_best: the best points so far, inside the ball, of the same shape and dtype.
        u: (B, 2 + C) float32, uniform numbers in [0, 1).
        side: side of the square, in 1 .. min(H, W).
        out: where to write; it may be x_adv or x_best, not x. The other arguments are those of
            `linf_step`.

    Source: Andriushchenko et al., "Square Attack" (ECCV 2020), algorithm 2.
    """
    op = "square_step"
    _check(op, x_adv, active, x_best=x_best, x=x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x_adv must be images [B, C, H, W], got shape {list(x.shape)}")
    if not isinstance(u, Tensor) or u.dtype != torch.float32:
        got = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"{op}: u must be a torch.float32 tensor, got {got}")
    check_strided(op, "u", u)
    if u.shape != (len(x), 2 + x.shape[1]):
        raise ValueError(
            f"{op}: u must have shape [{len(x)}, {2 + x.shape[1]}], got {list(u.shape)}"
        )
    check_device(op, "u", u, x)
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= min(x.shape[2:]):
        raise ValueError(f"{op}: side must be an integer in 1 .. {min(x.shape[2:])}, got {side!r}")
    if isinstance(out, Tensor):  # outside the square x_best is copied before x is read
        refuse_overlap(op, "out", out, (x, u))
    return run_out(
        *_square_step, (x_adv, x_best, x, u, side, *_ball(op, x, eps, lo, hi), active), out
    )


def square_stepper(
    x: Tensor, eps: float | Tensor, lo: float | Tensor | None, hi: float | Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, int, Tensor | None], None]:
    """`square_step` in place, as `stepper` gives the others: a function of (x_adv, x_best, u, side,
    active)."""
    ball = _ball("square_step", x, eps, lo, hi)

    def step(x_adv: Tensor, x_best: Tensor, u: Tensor, side: int, active: Tensor | None) -> None:
        _square_step[1](x_adv, x_best, x, u, side, *ball, active, x_adv)
        torch.autograd.graph.increment_version(x_adv)

    return step


def keep_rows_(mask: Tensor, x: Tensor, grad: Tensor, x_best: Tensor, grad_best: Tensor) -> None:
    """Copy the rows of x and grad where mask is True into x_best and grad_best, in one launch.

    Keeps the best iterate so far; with the pairs swapped, it jumps back to it.

    Args:
        mask: (B,) bool.
        x, grad: (B, ...), all four tensors of one shape and floating dtype.
        x_best, grad_best: changed in place; they may share no memory with each other or with x and
            grad.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, shared memory.
    """
    check_like("keep_rows_", "x", x, grad=grad, x_best=x_best, grad_best=grad_best)
    check_rows("keep_rows_", "mask", mask, x, torch.bool)
    refuse_overlap("keep_rows_", "x_best", x_best, (x, grad))
    refuse_overlap("keep_rows_", "grad_best", grad_best, (x, grad, x_best))
    _keep_rows(mask, x, grad, x_best, grad_best)
    torch.autograd.graph.increment_version((x_best, grad_best))


def keep_best_(
    loss: Tensor,
    x: Tensor,
    grad: Tensor | None,
    loss_best: Tensor,
    x_best: Tensor,
    grad_best: Tensor | None,
) -> None:
    """Copy loss and the rows of x and grad to the best ones where loss > loss_best.

    A NaN is never better.

    Args:
        loss, loss_best: (B,) of one floating dtype.
        x, x_best, grad, grad_best: (B, ...), all of one shape and floating dtype; both gradients
            may be None. The three best tensors change in place; they may share no memory with each
            other or with the rest.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, shared memory, one gradient without the
            other.
    """
    op = "keep_best_"
    check_like(op, "loss", loss, loss_best=loss_best)
    check_like(op, "x", x, x_best=x_best)
    check_rows(op, "loss", loss, x, loss.dtype)
    changed = [("loss_best", loss_best), ("x_best", x_best)]
    others = [loss, x]
    if grad is not None and grad_best is not None:
        check_like(op, "x", x, grad=grad, grad_best=grad_best)
        changed.append(("grad_best", grad_best))
        others.append(grad)
    elif grad is not grad_best:
        raise ValueError(f"{op}: grad and grad_best come together, or are both None")
    for name, t in changed:
        refuse_overlap(op, name, t, others)
        others.append(t)
    unchecked_keep_best_(loss, x, grad, loss_best, x_best, grad_best)


def unchecked_keep_best_(
    loss: Tensor,
    x: Tensor,
    grad: Tensor | None,
    loss_best: Tensor,
    x_best: Tensor,
    grad_best: Tensor | None,
) -> None:
    """`keep_best_` for a loop that knows its tensors."""
    _keep_best(loss, x, grad, loss_best, x_best, grad_best)
    changed = (loss_best, x_best) if grad_best is None else (loss_best, x_best, grad_best)
    torch.autograd.graph.increment_version(changed)


def _check(op: str, x_adv: Tensor, active: Tensor | None, **tensors: Tensor) -> None:
    check_like(op, "x_adv", x_adv, **tensors)
    if active is not None:
        check_rows(op, "active", active, x_adv, torch.bool)


def _parameters(
    op: str,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    convert = parameter if op in _ELEMENTWISE else row_parameter
    return convert(op, "alpha", alpha, x), *_ball(op, x, eps, lo, hi)


def _ball(
    op: str,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    convert = parameter if op in _ELEMENTWISE else row_parameter
    return convert(op, "eps", eps, x, nonnegative=True), *box_parameters(op, x, lo, hi)
