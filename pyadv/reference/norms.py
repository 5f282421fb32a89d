"""Norms of weight tensors and their product, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyadv.menus import WeightNorm
from pyadv.tensors import compute_dtype, widen


def norms(weights: Sequence[Tensor], kind: WeightNorm = "frobenius") -> Tensor:
    """Return (L,) Frobenius norms, or spectral norms of w.flatten(1). See `ops.norms`."""
    if kind == "spectral":
        values = [torch.linalg.matrix_norm(widen(w).flatten(1), 2) for w in weights]
    else:
        values = [torch.linalg.vector_norm(widen(w)) for w in weights]
    return torch.stack(values)


def log_norm_product(weights: Sequence[Tensor], kind: WeightNorm = "frobenius") -> Tensor:
    """Return sum_l log ||w_l||. See `ops.log_norm_product`."""
    return log_product(norms(weights, kind))


def log_product(values: Tensor) -> Tensor:
    """Return sum_l log n_l of norms n_l. A zero makes it -inf and has gradient 0 instead of NaN."""
    zero = values == 0
    return torch.where(zero, -math.inf, torch.where(zero, 1.0, values).log()).sum()


def norms_backward(grad: Tensor, weights: Sequence[Tensor], norms: Tensor) -> list[Tensor]:
    """Return grad_l w_l / ||w_l||, and 0 for a zero tensor."""
    scale = torch.where(norms == 0, 0.0, grad / norms).to(compute_dtype(weights[0].dtype))
    products = ((widen(w) * s).to(w.dtype) for w, s in zip(weights, scale, strict=True))
    return [torch.empty_like(w).copy_(p) for w, p in zip(weights, products, strict=True)]
