"""Norms of weight tensors and their product, in plain PyTorch. Functions of `pyadv.ops` of the same
name have the same arguments; the tests hold the kernels against what stands here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyadv.tensors import compute_dtype, widen


def norms(weights: Sequence[Tensor], kind: str = "frobenius") -> Tensor:
    """(L,): the Frobenius norm, or the spectral norm of w.flatten(1). See `ops.norms`."""
    if kind == "spectral":
        values = [torch.linalg.matrix_norm(widen(w).flatten(1), 2) for w in weights]
    else:
        values = [torch.linalg.vector_norm(widen(w)) for w in weights]
    return torch.stack(values)


def log_norm_product(weights: Sequence[Tensor], kind: str = "frobenius") -> Tensor:
    """sum_l log ||w_l||. See `ops.log_norm_product`."""
    return log_product(norms(weights, kind))


def log_product(values: Tensor) -> Tensor:
    """sum_l log n_l of norms; a zero makes it -inf and has gradient 0 instead of NaN."""
    zero = values == 0
    return torch.where(zero, -math.inf, torch.where(zero, 1.0, values).log()).sum()


def norms_backward(grad: Tensor, weights: Sequence[Tensor], norms: Tensor) -> list[Tensor]:
    """grad_l w_l / ||w_l||, and 0 for a zero tensor."""
    scale = torch.where(norms == 0, 0.0, grad / norms).to(compute_dtype(weights[0].dtype))
    products = ((widen(w) * s).to(w.dtype) for w, s in zip(weights, scale, strict=True))
    return [torch.empty_like(w).copy_(p) for w, p in zip(weights, products, strict=True)]
