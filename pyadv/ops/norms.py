"""Norms of weight tensors, and their product over the layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyadv import reference
from pyadv.menus import WEIGHT_NORMS, WeightNorm
from pyadv.ops.arguments import check_choice, check_device, check_floating
from pyadv.ops.registry import refuse_double_backward, register
from pyadv.reference.norms import log_product, norms_backward
from pyadv.tensors import compute_dtype

_norms_backward = register(
    "norms_backward(Tensor grad, Tensor[] weights, Tensor norms) -> Tensor[]",
    norms_backward,
    lambda grad, weights, norms: [torch.empty_like(w) for w in weights],
    **refuse_double_backward("norms"),
)


def _keep(ctx: Any, inputs: tuple[list[Tensor]], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> list[Tensor]:
    *weights, values = ctx.saved_tensors
    return _norms_backward(grad, weights, values)


_norms = register(
    "norms(Tensor[] weights) -> Tensor",
    reference.norms,
    lambda weights: weights[0].new_empty(len(weights), dtype=compute_dtype(weights[0].dtype)),
    backward=_backward,
    setup_context=_keep,
)


def norms(weights: Sequence[Tensor], kind: WeightNorm = "frobenius") -> Tensor:
    """Return the norm of each of L tensors, (L,), differentiable.

    Args:
        weights: tensors of any shapes and layouts, of one floating-point dtype, on one device.
        kind: "frobenius", all tensors in one launch, with gradient w / ||w||; or "spectral", the
            largest singular value of w.flatten(1) by a full decomposition (use `NormProduct` in a
            training loop).

    The result is float32 (float64 for float64 weights). A tensor of zeros has gradient 0. The
    Frobenius norm has no second derivative; use `reference.norms` for it.

    Raises:
        TypeError: `weights` is not a sequence of floating-point tensors of one dtype.
        ValueError: the sequence is empty, the devices differ, the kind is unknown, or a tensor has
            fewer than two dimensions and the kind is "spectral".
    """
    return _norms_of(_checked("norms", weights, kind), kind)


def log_norm_product(weights: Sequence[Tensor], kind: WeightNorm = "frobenius") -> Tensor:
    """Return sum_l log ||w_l||, the logarithm of the product of the norms, differentiable.

    The product itself over- and underflows for deep networks. The gradient w_l / ||w_l||^2
    (Frobenius) does not depend on the scale of the other layers. A tensor of zeros makes the value
    -inf and has gradient 0. Arguments and errors are those of `norms`.
    """
    return log_product(_norms_of(_checked("log_norm_product", weights, kind), kind))


def _norms_of(weights: list[Tensor], kind: WeightNorm) -> Tensor:
    return _norms(weights) if kind == "frobenius" else reference.norms(weights, kind)


def _checked(op: str, weights: Sequence[Tensor], kind: WeightNorm) -> list[Tensor]:
    check_choice(op, "kind", kind, WEIGHT_NORMS)
    if not isinstance(weights, (Sequence, Iterator)) or isinstance(weights, str):
        raise TypeError(
            f"{op}: weights must be a sequence of tensors, got one {type(weights).__name__}"
        )
    weights = list(weights)
    if not weights:
        raise ValueError(f"{op}: weights must not be empty")
    for i, w in enumerate(weights):
        check_floating(op, **{f"weights[{i}]": w})
        if w.dtype != weights[0].dtype:
            raise TypeError(
                f"{op}: all weights must have one dtype, got {weights[0].dtype} and {w.dtype}"
            )
        check_device(op, f"weights[{i}]", w, weights[0])
        if kind == "spectral" and w.dim() < 2:
            raise ValueError(
                f"{op}: a spectral norm needs at least two dimensions, "
                f"got weights[{i}] of shape {list(w.shape)}"
            )
    return weights
