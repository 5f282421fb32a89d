"""Losses of logits, one value per sample, never averaged. Values and gradients come from one pass
over each row of logits.

Logits are (B, C), float16, bfloat16, float32 or float64, in any memory layout; labels are (B,)
int64. Arithmetic and values are in float32 (float64 for float64); gradients have the dtype of the
logits, rounded once. p = softmax(logits); m is the runner-up argmax_{j != y} z_j. Where classes
tie, the first counts. A row whose label is no class (outside 0 .. C - 1) has the value NaN and a
zero gradient.

A logit of -inf takes its class out of play: the class has probability 0 and gradient 0, and is the
runner-up only if no other class but y is left. A row has an answer if its largest logit is finite.
Rows without an answer have a NaN or +inf, or no class in play, and their loss is NaN.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyadv import reference
from pyadv.menus import ATTACK_LOSSES, SCALES, AttackLossName, Scale
from pyadv.ops.arguments import check_choice, check_device, check_floating, check_like, check_rows
from pyadv.ops.registry import refuse_double_backward, register
from pyadv.reference import losses as _reference
from pyadv.reference.losses import AttackLoss, RowStats
from pyadv.tensors import compute_dtype

_LEAST_CLASSES = {"dlr": 3, "dlr_targeted": 4}


def _values(logits: Tensor, *args: Any) -> Tensor:
    """Return the fake result of an op that gives one value per row."""
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


def _gradient(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _two_gradients(grad: Tensor, logits_adv: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _gradient(grad, logits_adv), _gradient(grad, logits_adv)


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _in_one_pass(logits: Tensor) -> bool:
    """Return whether the forward pass computes the gradient too, which the backward pass scales in
    place. On a CPU this saves computing the exponentials twice. A GPU would lose more time to
    memory traffic, and 16-bit gradients would be rounded before they are scaled."""
    return logits.is_cpu and logits.dtype.itemsize >= 4 and not torch.compiler.is_compiling()


def _attack_loss_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    correct = logits.new_empty(logits.shape[:1], dtype=torch.bool)
    return _values(logits), logits.new_empty(logits.shape), correct


def _row_stats_fake(logits: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    top = logits.new_empty((logits.shape[0], 4), dtype=compute_dtype(logits.dtype))
    index = torch.empty_like(top, dtype=torch.int64)
    return torch.empty_like(y), _values(logits), _values(logits), top, index


def _differentiable(
    schema: str,
    fake_gradient: Callable[..., Any],
    kernel: Callable[..., Any],
    gradients: int,
    one_pass: bool = True,
) -> type[torch.autograd.Function]:
    """Register a differentiable op and return the autograd function that calls it.

    Besides `schema` this registers `<name>_backward`, which takes the gradient of the values and
    returns the gradients of the first `gradients` arguments, and with `one_pass`
    `<name>_and_gradient`, which returns the values and those gradients.

    A torch.autograd.Function has half the overhead of torch.library.register_autograd, which
    matters for small batches.
    """
    name, _, arguments = schema.partition("(")
    value = getattr(reference, name)
    gradient = getattr(_reference, f"{name}_backward")
    forward_op = register(f"{schema} -> Tensor", value, kernel)
    backward_op = register(
        f"{name}_backward(Tensor grad, {arguments} -> {_results(gradients)}",
        gradient,
        fake_gradient,
        **refuse_double_backward(name),
    )
    if one_pass:

        def value_and_gradient(*args: Any) -> tuple[Tensor, ...]:
            values = value(*args)
            return (values, *_as_tuple(gradient(torch.ones_like(values), *args)))

        both_op = register(
            f"{name}_and_gradient({arguments} -> {_results(1 + gradients)}",
            value_and_gradient,
            lambda *args: (kernel(*args), *_as_tuple(fake_gradient(None, *args))),
        )

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ready = one_pass and _in_one_pass(args[0]) and any(ctx.needs_input_grad)
            values, *ctx.unit = both_op(*args) if ready else (forward_op(*args),)
            ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
            saved = [a for a in args if isinstance(a, Tensor)]
            if not torch.compiler.is_compiling():  # autograd saves no tensor of inference mode
                saved = [a.clone() if a.is_inference() else a for a in saved]
            ctx.save_for_backward(*saved)
            return values

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            unit, ctx.unit = ctx.unit, ()
            grads: Sequence[Tensor | None]
            if unit and not torch.is_grad_enabled():
                rows = grad.unsqueeze(1)
                needed = ctx.needs_input_grad
                grads = [g.mul_(rows) if n else None for g, n in zip(unit, needed, strict=False)]
            else:  # a second backward pass, or a differentiable one, which the op refuses
                saved = iter(ctx.saved_tensors)
                args = [next(saved) if c is None else c[0] for c in ctx.constants]
                grads = _as_tuple(backward_op(grad, *args))
            return (*grads, *(None,) * (len(ctx.constants) - gradients))

    Fused.__name__ = Fused.__qualname__ = name
    return Fused


_attack_loss = register(
    "attack_loss(Tensor logits, Tensor y, str loss, Tensor? reference_logits, Tensor? target, "
    "str scale) -> (Tensor, Tensor, Tensor)",
    reference.attack_loss,
    _attack_loss_fake,
)
_WeightedCrossEntropy = _differentiable(
    "weighted_cross_entropy(Tensor logits, Tensor y, Tensor? weight, int? ignore_index)",
    _gradient,
    _values,
    1,
)
_TradesKL = _differentiable(
    "trades_kl(Tensor logits_adv, Tensor logits)", _two_gradients, _values, 2
)
_MartBCE = _differentiable(
    "mart_bce(Tensor logits_adv, Tensor y, bool exact)", _gradient, _values, 1
)
_MartKL = _differentiable(
    "mart_kl(Tensor logits_adv, Tensor logits, Tensor y, bool exact, bool detach_weight)",
    _two_gradients,
    _values,
    2,
)
_RowSquareSum = _differentiable(
    "row_square_sum(Tensor g)", lambda grad, g: torch.empty_like(g), _values, 1, one_pass=False
)
_softmax_cotangent = register(
    "softmax_cotangent(Tensor logits, float temperature, bool center) -> Tensor",
    reference.softmax_cotangent,
    lambda logits, *args: logits.new_empty(logits.shape),
)
_row_stats = register(
    "row_stats(Tensor logits, Tensor y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.row_stats,
    _row_stats_fake,
)


def _check_logits(op: str, name: str, logits: Tensor, least: int = 2, what: str = "") -> None:
    check_floating(op, **{name: logits})
    if logits.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape [B, C], got {list(logits.shape)}")
    if logits.shape[1] < least:
        raise ValueError(
            f"{op}: {what or name} needs at least {least} classes, got C = {logits.shape[1]}"
        )


def _check_logits_and_labels(op: str, name: str, logits: Tensor, y: Tensor) -> None:
    _check_logits(op, name, logits)
    check_rows(op, "y", y, logits, torch.int64)


def attack_loss(
    logits: Tensor,
    y: Tensor,
    loss: AttackLossName,
    reference_logits: Tensor | None = None,
    target: Tensor | None = None,
    scale: Scale = "unit",
) -> AttackLoss:
    """Return `(loss, grad_logits, correct)`, all that one iteration of an attack needs from logits.

    The attack maximises `loss` with `torch.autograd.grad(logits, x_adv, grad_logits)`.

    ================= ==================================================================
    loss              value of a row (sorted logits are z_(1) >= z_(2) >= ...)
    ================= ==================================================================
    "ce"              -log p_y
    "margin"          z_m - z_y
    "dlr"             -(z_y - z_m) / (z_(1) - z_(3) + 1e-12), C >= 3
    "kl"              KL(softmax(reference_logits) || p)
    "slm"             logsumexp_{j != y} z_j - z_y
    "ce_targeted"     log p_t, t = target
    "margin_targeted" z_t - z_y
    "dlr_targeted"    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), C >= 4
    ================= ==================================================================

    y is always the true class. `margin_targeted` is the numerator of `dlr_targeted`, as in the
    multi-targeted attack. The targeted margin of Carlini and Wagner, z_t - max_{j != t} z_j, is
    minus "margin" with y = t.

    Classes out of play (-inf) change a loss as follows. Where the loss is infinite, or the label is
    out of play, the gradient is zero. A label out of play is never correct.

    ================= ==================================================================
    out of play       value
    ================= ==================================================================
    label y           +inf; "ce_targeted" and "kl" keep their own value
    all but y         "ce" 0; "margin", "dlr", "slm" -inf
    target t          -inf in the targeted losses, unless y is out of play too
    all but t         "ce_targeted" 0
    k, for p alone    "kl" +inf; a class that is out of play for q adds 0
    z_(3), z_(4)      "dlr" and "dlr_targeted" are the margin: they divide by 1 when fewer
                      than three (four) classes are in play
    ================= ==================================================================

    Args:
        logits: (B, C).
        y: (B,) int64, the true classes.
        loss: a name of the table.
        reference_logits: (B, C), the natural logits; only for "kl".
        target: (B,) int64, the classes to reach; only for the targeted losses.
        scale: "exact" gives the true gradient, with 1 - p_y as the sum of the other probabilities.
            "unit" multiplies each row by a positive number that keeps it from vanishing on
            confident rows: "ce" is softmax over the other classes minus the one-hot label (and
            "ce_targeted" its negative at the target); "kl", "dlr" and "dlr_targeted" are divided by
            their largest absolute entry (a zero row stays zero); "margin", "margin_targeted" and
            "slm" have that size already. Use "unit" only where each row depends on its own input
            and gradients are not averaged.

    Returns:
        loss: (B,), float32 (float64 for float64).
        grad_logits: (B, C), contiguous, in the dtype of the logits.
        correct: (B,) bool, whether the row has an answer and argmax == y.
        None of them requires grad. The loss is NaN and the gradient zero where the logits or the
        reference logits have no answer, or where the label or the target is no class.

    Raises:
        TypeError: logits not floating-point, labels not int64, reference_logits of another dtype.
        ValueError: shapes or devices differ, an unknown loss or scale, too few classes for the
            loss, a missing `reference_logits` or `target`, or one that the loss does not take.

    Source: cross-entropy, Madry et al. (ICLR 2018); margin, Carlini and Wagner (S&P 2017); DLR,
    Croce and Hein (ICML 2020); KL, Zhang et al. (ICML 2019); SLM, Ding et al.
    (ICLR 2020); targeted margin, Gowal et al., "An Alternative Surrogate Loss for
    PGD-based Adversarial Testing" (2019).
    """
    check_choice("attack_loss", "loss", loss, ATTACK_LOSSES)
    check_choice("attack_loss", "scale", scale, SCALES)
    _check_logits("attack_loss", "logits", logits, _LEAST_CLASSES.get(loss, 2), f"loss {loss!r}")
    check_rows("attack_loss", "y", y, logits, torch.int64)
    _check_taken("reference_logits", reference_logits, loss, loss == "kl")
    _check_taken("target", target, loss, loss.endswith("_targeted"))
    if reference_logits is not None:
        check_like("attack_loss", "logits", logits, reference_logits=reference_logits)
    if target is not None:
        check_rows("attack_loss", "target", target, logits, torch.int64)
    return AttackLoss(*_attack_loss(logits, y, loss, reference_logits, target, scale))


def _check_taken(name: str, value: Tensor | None, loss: str, taken: bool) -> None:
    if taken and value is None:
        raise ValueError(f"attack_loss: loss {loss!r} needs {name}, got None")
    if not taken and value is not None:
        raise ValueError(f"attack_loss: loss {loss!r} takes no {name}, got one")


def weighted_cross_entropy(
    logits: Tensor, y: Tensor, weight: Tensor | None = None, ignore_index: int | None = None
) -> Tensor:
    """Return weight * cross-entropy, (B,), differentiable once with respect to logits and weight.

    Hard labels: -weight log p_y. Soft labels: -weight sum_k y_k log p_k.

    Args:
        logits: (B, C).
        y: (B,) int64 classes, or (B, C) floating-point soft labels, which are constants.
        weight: (B,) floating-point, one weight per sample; None stands for ones.
        ignore_index: rows with this label have value and gradient 0; for hard labels.

    Returns:
        (B,), float32 (float64 for float64). A row without an answer is NaN in value and gradient. A
        label at -inf, or a soft label above 0 on a class at -inf, gives +inf and a zero gradient.

    Raises:
        TypeError: logits or weight not floating-point, y of another dtype.
        ValueError: shapes or devices differ, fewer than 2 classes, `ignore_index` with soft labels,
            soft labels that require grad.

    Source: GAIRAT, Zhang et al. (ICLR 2021) and MAIL, Liu et al. (NeurIPS 2021) weigh cross-entropy
    in this way.
    """
    op = "weighted_cross_entropy"
    _check_logits(op, "logits", logits)
    if isinstance(y, Tensor) and y.dim() == 2:
        _check_soft_labels(op, y, logits, ignore_index)
    else:
        check_rows(op, "y", y, logits, torch.int64)
    if weight is None:
        return _WeightedCrossEntropy.apply(logits, y, None, ignore_index)
    check_floating(op, weight=weight)
    check_rows(op, "weight", weight, logits, weight.dtype)
    if weight.requires_grad:  # rare: weights are constants in every published method
        loss = _WeightedCrossEntropy.apply(logits, y, None, ignore_index)
        return weight.to(loss.dtype) * loss
    return _WeightedCrossEntropy.apply(logits, y, weight, ignore_index)


def _check_soft_labels(op: str, y: Tensor, logits: Tensor, ignore_index: int | None) -> None:
    check_floating(op, y=y)
    if y.shape != logits.shape:
        raise ValueError(
            f"{op}: soft labels y must have the shape of logits, "
            f"got {list(y.shape)} and {list(logits.shape)}"
        )
    check_device(op, "y", y, logits)
    if ignore_index is not None:
        raise ValueError(f"{op}: ignore_index is for hard labels, got soft ones")
    if y.requires_grad:
        raise ValueError(
            f"{op}: soft labels are constants and must not require grad; detach them, "
            f"or use pyadv.reference.{op}"
        )


def trades_kl(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """Return KL(q || p) with q = softmax(logits) and p = softmax(logits_adv), (B,), differentiable
    once with respect to both.

    A row without an answer is NaN in value and gradients. A class that is in play for q and at -inf
    for p gives +inf and zero gradients.

    Args:
        logits_adv, logits: (B, C), of the same dtype.

    Raises:
        TypeError: not floating-point, or of different dtypes.
        ValueError: not [B, C], or shapes or devices differ.

    Source: TRADES, Zhang et al. (ICML 2019).
    """
    _check_logits("trades_kl", "logits_adv", logits_adv)
    check_like("trades_kl", "logits_adv", logits_adv, logits=logits)
    return _TradesKL.apply(logits_adv, logits)


def mart_bce(logits_adv: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """Return MART's boosted cross-entropy, (B,), differentiable once.

    -log p_y - log(1.0001 - p_m + 1e-12), as in the official code; `exact=True` is the formula of
    the paper, -log p_y - log(1 - p_m), with 1 - p_m as the sum of the other probabilities. A row
    without an answer is NaN in value and gradient; a label at -inf gives +inf and a zero gradient.

    Args:
        logits_adv: (B, C), of the adversarial inputs.
        y: (B,) int64.
        exact: leave out the constants of the official code.

    Raises:
        TypeError: logits not floating-point, y not int64.
        ValueError: shapes or devices differ, fewer than 2 classes.

    Source: MART, Wang et al. (ICLR 2020).
    """
    _check_logits_and_labels("mart_bce", "logits_adv", logits_adv, y)
    return _MartBCE.apply(logits_adv, y, exact)


def mart_kl(
    logits_adv: Tensor, logits: Tensor, y: Tensor, exact: bool = False, detach_weight: bool = False
) -> Tensor:
    """Return MART's weighted divergence, (B,), differentiable once with respect to both logits.

    (1.0000001 - q_y) sum_k q_k (log q_k - log(p_k + 1e-12)), as in the official code; `exact=True`
    is the formula of the paper, (1 - q_y) KL(q || p). q = softmax(logits), p = softmax(logits_adv).
    A row without an answer is NaN in value and gradients. With `exact=True` a class that is in play
    for q and at -inf for p gives +inf and zero gradients.

    Args:
        logits_adv, logits: (B, C), of the adversarial and the clean inputs, of the same dtype.
        y: (B,) int64.
        exact: leave out the constants of the official code.
        detach_weight: stop the gradient through 1 - q_y, which the official code lets pass.

    Raises:
        TypeError: logits not floating-point or of different dtypes, y not int64.
        ValueError: shapes or devices differ, fewer than 2 classes.

    Source: MART, Wang et al. (ICLR 2020).
    """
    _check_logits_and_labels("mart_kl", "logits_adv", logits_adv, y)
    check_like("mart_kl", "logits_adv", logits_adv, logits=logits)
    return _MartKL.apply(logits_adv, logits, y, exact, detach_weight)


def row_square_sum(g: Tensor) -> Tensor:
    """Return the sum of squares of each row, (B,), differentiable once. It is float32 (float64 for
    float64).

    Args:
        g: (B, ...), any memory layout.

    Raises:
        TypeError: not floating-point.
        ValueError: no batch dimension.

    Source: the penalty of EMR and of input-gradient regularisation, Ross and Doshi-Velez (AAAI
    2018), is the mean of these rows.
    """
    check_like("row_square_sum", "g", g)
    return _RowSquareSum.apply(g)


def softmax_cotangent(logits: Tensor, temperature: float, center: bool = False) -> Tensor:
    """Return softmax(logits / temperature), (B, C), without gradient. Its product with the Jacobian
    is the gradient that EMR penalises.

    Args:
        logits: (B, C). A row without an answer gives NaN.
        temperature: > 0; small values approach the one-hot argmax, large ones the uniform mean.
        center: subtract the mean over the classes in play, so that the cotangent sums to 0 and a
            shift that all logits share is not penalised.

    Raises:
        TypeError: logits not floating-point, temperature not a float.
        ValueError: not [B, C], or temperature not > 0.

    Source: the regulariser for large-scale models of effective margin regularisation (EMR).
    """
    _check_logits("softmax_cotangent", "logits", logits, least=1)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, numbers.Real)):
        got = type(temperature).__name__
        raise TypeError(f"softmax_cotangent: temperature must be a float, got {got}")
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(
            f"softmax_cotangent: temperature must be a finite number > 0, got {temperature}"
        )
    return _softmax_cotangent(logits, float(temperature), center)


def row_stats(logits: Tensor, y: Tensor) -> RowStats:
    """Return runner-up, margins and the four largest logits of each row, in one pass.

    Args:
        logits: (B, C).
        y: (B,) int64.

    Returns:
        runner_up: (B,) int64, m.
        margin: (B,), z_y - z_m; positive where the row is classified as y. -inf where y is out of
            play, +inf where no other class is in play.
        prob_margin: (B,), p_y - p_m, in [-1, 1], without cancellation.
        top4: (B, 4), the largest logits in falling order; -inf after the classes in play.
        top4_index: (B, 4) int64, their classes; -1 after the classes in play.
        Values are float32 (float64 for float64) and never require grad. The first three are -1, NaN
        and NaN where y is no class; so are all where a row has no answer.

    Raises:
        TypeError: logits not floating-point, y not int64.
        ValueError: shapes or devices differ, fewer than 2 classes.
    """
    _check_logits_and_labels("row_stats", "logits", logits, y)
    return RowStats(*_row_stats(logits, y))
