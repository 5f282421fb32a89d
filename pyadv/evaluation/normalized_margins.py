"""Differences of logits that are independent of the scale of the logits: divided by the slope of
the network at the input, or by a bound on its slope from the norms of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyadv import ops
from pyadv.attacks.minimum_norm import boundaries, other_classes
from pyadv.engine import checks
from pyadv.engine.attack import Model
from pyadv.engine.loop import check_first
from pyadv.engine.losses import check_classes
from pyadv.menus import Norm
from pyadv.passes.borrow import (
    Output,
    borrowed,
    device_of,
    gradients_on,
    owned,
    pick_logits,
    unwrap,
)
from pyadv.tensors import compute_dtype

_POWER_ITERATIONS = 100  # many, since the number is reported


def effective_margin(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm | float = "Linf",
    output: Output = None,
) -> Tensor:
    """Return min over j != y of (z_y - z_j) / ||grad_x (z_y - z_j)||_q: (B,), in units of x.

    This is the distance to the decision boundary of the linearised network: a first-order estimate,
    neither an upper nor a lower bound. Where x is not classified as y it is negative: minus the
    distance to the farthest boundary that x is on the wrong side of. A zero gradient gives an
    infinite distance; a gradient that is not finite gives no boundary.

    The cost is one forward pass and one input gradient per class, computed one at a time.

    Args:
        model: maps x to logits (B, C), C >= 2. It is evaluated in eval mode and gets its modes
            back.
        x: (B, ...) floating point.
        y: (B,) int64 labels.
        norm: norm of the distance, "Linf", "L2" or "L1", for q = 1, 2 or inf.
        output: as in `PGD`.

    Raises:
        ValueError, TypeError: for x, y and logits that an attack refuses.

    Source: the distance in the first step of DeepFool (Moosavi-Dezfooli et al., CVPR 2016,
    equations 8 and 11).
    """
    return logits_and_margin(model, x, y, norm, output)[1]


def logits_and_margin(
    model: Model, x: Tensor, y: Tensor, norm: Norm | float, output: Output
) -> tuple[Tensor, Tensor]:
    """Return the logits (B, C) and the effective margin computed from them, both detached."""
    norm = checks.canonical_norm(norm)
    checks.batch(x, y, None)
    model, x, y = unwrap(model), owned(x), owned(y)
    with gradients_on(), borrowed(model):
        leaf = x.requires_grad_()
        logits = pick_logits(model(leaf), output)
        check_first(logits, y, validate=x.device.type == "cpu", differentiate=True)
        check_classes(logits)
        known = y.clamp(0, logits.shape[1] - 1)  # other labels are refused where values are read
        least = torch.full_like(y, torch.inf, dtype=compute_dtype(x.dtype))
        others = other_classes(logits, known)
        for difference, _, slope in boundaries(logits, leaf, known, others, norm):
            margin = torch.where(difference == 0, 0.0, -difference / slope)
            least = torch.where(slope.isfinite(), torch.minimum(least, margin), least)
    return logits.detach(), least


def spectrally_normalized_margin(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 500,
    output: Output = None,
) -> Tensor:
    """Return (z_y - max over j != y of z_j) / prod_l ||W_l||, with the spectral norms of the linear
    maps of all linear and convolution layers: (N,) float64 on the CPU.

    The value compares networks of one architecture, or one network over training, independently of
    the scale of their weights. It is not a distance: normalisation layers and shortcuts do not
    count, see `ops.NormProduct`; `lipschitz_bound` gives certificates. The spectral complexity of
    Bartlett et al. has another factor, with the (2,1) norms of the layers, which is omitted here.

    Args:
        model: maps x to logits (B, C). It is evaluated in eval mode and gets its modes back.
        x: (N, ...) floating point; batches move to the device of the model.
        y: (N,) int64 labels.
        batch_size: samples per batch, >= 1.
        output: as in `PGD`.

    Source: Bartlett, Foster and Telgarsky, "Spectrally-normalized margin bounds for neural
    networks" (NeurIPS 2017).
    """
    checks.batch(x, y, None)
    checks.count("batch_size", batch_size, 1)
    network, device = unwrap(model), device_of(model, x)
    if not isinstance(network, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(network).__name__}")
    parts: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad(), borrowed(network):
        product = ops.NormProduct(network, x.shape[1:], "spectral", "operator").eval()
        product.iterate(_POWER_ITERATIONS)
        log_product = product().double().cpu()
        for rows, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = pick_logits(network(rows.to(device, copy=True)), output)
            checks.logits(logits, labels)
            parts.append(ops.row_stats(logits, labels.to(device)).margin.double().cpu())
    return torch.cat(parts) * torch.exp(-log_product)
