"""Instance weights, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv.menus import KappaNormalize, KappaWeightName, MarginName, MarginNormalize
from pyadv.tensors import compute_dtype, widen


def gairat_weights(
    kappa: Tensor,
    steps: int,
    lam: float | Tensor = -1.0,
    kind: KappaWeightName = "tanh",
    normalize: KappaNormalize = "mean",
    slope: float | None = None,
    int_half: bool = False,
) -> Tensor:
    """Return sigma(2 (lam + slope (1 - 2 kappa / K))), normalised. See `ops.gairat_weights`."""
    k = kappa.double()
    half = steps // 2 if int_half and steps > 1 else steps / 2
    a = torch.as_tensor(lam, dtype=k.dtype, device=k.device)
    a = a + (half - k) * ((5.0 if slope is None else slope) / half)
    if kind == "discrete":
        weights = (steps + 1 - k) / (steps + 1)
    else:
        weights = torch.sigmoid(2 * a if kind == "tanh" else a)  # (1 + tanh a) / 2 = sigma(2 a)
    return _normalized(weights, normalize).float()


def mail_weights(
    margin: Tensor,
    slope: float | Tensor,
    bias: float | Tensor,
    normalize: MarginNormalize = "mean",
) -> Tensor:
    """Return sigma(-slope (margin - bias)), normalised. See `ops.mail_weights`."""
    m = margin.detach().double()
    slope, bias = (torch.as_tensor(t, dtype=m.dtype, device=m.device) for t in (slope, bias))
    weights = torch.sigmoid(-slope * (m - bias))
    return _normalized(weights, normalize).to(compute_dtype(margin.dtype))


def probabilistic_margin(
    logits: Tensor, y: Tensor, logits_adv: Tensor | None = None, kind: MarginName = "nat"
) -> Tensor:
    """Return p_y minus the largest other probability, or minus q_y. See
    `ops.probabilistic_margin`."""
    p = other = _softmax(logits)
    if kind != "nat":
        if logits_adv is None:
            raise ValueError(f"probabilistic_margin: kind={kind!r} needs logits_adv")
        other = _softmax(logits_adv)
    if kind == "adv":
        p = other
    known = (y >= 0) & (y < p.shape[1])
    index = y.where(known, 0)[:, None]
    if kind != "dif_conf":
        other = other.scatter(1, index, -1.0).amax(1)
    else:
        other = other.gather(1, index)[:, 0]
    return (p.gather(1, index)[:, 0] - other).where(known, torch.nan)


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax of each row, or NaN for a row that is not finite."""
    z = widen(logits.detach())
    return z.where(z.isfinite().all(1, keepdim=True), torch.nan).softmax(1)


def _normalized(weights: Tensor, normalize: KappaNormalize | MarginNormalize) -> Tensor:
    """Normalise the weights; "mean" and "sum" treat weights that are all 0 as equal."""
    if normalize in ("none", "x3"):
        return weights if normalize == "none" else 3.0 * weights
    total = weights.sum()
    shares = torch.where(total == 0, 1.0 / max(weights.numel(), 1), weights / total)
    if normalize == "sum":
        return shares
    return torch.where(total == 0, 1.0, shares * weights.numel())
