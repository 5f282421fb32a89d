"""Instance weights: how much each sample of a batch counts in the training loss.

No gradient passes through them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyadv import reference
from pyadv.menus import (
    KAPPA_NORMALIZES,
    KAPPA_WEIGHTS,
    MARGIN_NORMALIZES,
    MARGINS,
    KappaNormalize,
    KappaWeightName,
    MarginName,
    MarginNormalize,
)
from pyadv.ops.arguments import check_choice, check_floating, check_like, check_rows, parameter
from pyadv.ops.losses import _check_logits_and_labels, row_stats, weighted_cross_entropy
from pyadv.ops.registry import register
from pyadv.tensors import compute_dtype

_gairat_weights = register(
    "gairat_weights(Tensor kappa, int steps, Tensor lam, str kind, str normalize, float? slope,"
    " bool int_half) -> Tensor",
    reference.gairat_weights,
    lambda kappa, *_: kappa.new_empty(kappa.shape, dtype=torch.float32),
)
_mail_weights = register(
    "mail_weights(Tensor margin, Tensor slope, Tensor bias, str normalize) -> Tensor",
    reference.mail_weights,
    lambda margin, *_: margin.new_empty(margin.shape, dtype=compute_dtype(margin.dtype)),
)


def gairat_weights(
    kappa: Tensor,
    steps: int,
    lam: float | Tensor = -1.0,
    kind: KappaWeightName = "tanh",
    normalize: KappaNormalize = "mean",
    slope: float | None = None,
    int_half: bool = False,
) -> Tensor:
    """Return weights that decrease with the geometry value, (B,) float32.

    With a = lam + slope (1 - 2 kappa / K), "tanh" is (1 + tanh a) / 2, "sigmoid" is
    1 / (1 + exp(-a)), and "discrete" is (K + 1 - kappa) / (K + 1). The weights are finite for every
    lam, also for infinite ones.

    Args:
        kappa: (B,) int64 in {0, ..., K}, see `track`.
        steps: K >= 1, the number of steps of the attack that counted kappa.
        lam: the paper's lambda, a float or a 0-dim tensor; +inf gives equal weights.
        kind: "tanh" (the paper), "sigmoid" or "discrete" (which uses neither lam nor slope).
        normalize: "mean" gives weights of mean 1 over this batch, "sum" weights of sum 1; if all
            weights are 0 (lam = -inf) they count as equal. "none" leaves them in [0, 1].
        slope: the amount by which a decreases from kappa = 0 to the centre K / 2, finite and >= 0;
            None is the paper's 5. GAIR-RST's slope of 1 per step is `slope=steps / 2` with
            `normalize="none"`.
        int_half: whether the centre is floor(K / 2), as in the official code, with the slope
            reached there. For K = 1, where that code divides by 0, the true half is used.

    Raises:
        TypeError: another dtype. ValueError: wrong shapes or devices, steps < 1, slope < 0, NaN, or
            an unknown kind or normalize.

    Source: Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training" (ICLR 2021),
    equation 6.
    """
    op = "gairat_weights"
    check_rows(op, "kappa", kappa, kappa, torch.int64)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{op}: steps must be an integer >= 1, got {steps!r}")
    check_choice(op, "kind", kind, KAPPA_WEIGHTS)
    check_choice(op, "normalize", normalize, KAPPA_NORMALIZES)
    if slope is not None:
        if not isinstance(slope, (int, float)):
            raise TypeError(f"{op}: slope must be a float or None, got {type(slope).__name__}")
        if not 0 <= slope < math.inf:
            raise ValueError(f"{op}: slope must be a finite number >= 0, got {slope}")
    lam = _single(op, "lam", lam, kappa)
    return _gairat_weights(kappa, steps, lam, kind, normalize, slope, int_half)


def mail_weights(
    margin: Tensor,
    slope: float | Tensor,
    bias: float | Tensor,
    normalize: MarginNormalize = "mean",
) -> Tensor:
    """Return weights that decrease with the probabilistic margin: sigma(-slope (margin - bias)),
    (B,) float32 (float64 for float64).

    Args:
        margin: (B,) floating-point, see `probabilistic_margin`.
        slope, bias: a float or a 0-dim tensor, as the options of these names in the official code.
        normalize: "mean" gives weights of mean 1 over this batch (the paper; equal weights if all
            are 0), "x3" multiplies by 3 (the official code), "none" leaves them in [0, 1].

    Raises:
        TypeError: another dtype. ValueError: wrong shapes or devices, NaN, or an unknown normalize.

    Source: Liu et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training"
    (NeurIPS 2021), equation 7.
    """
    op = "mail_weights"
    check_floating(op, margin=margin)
    check_rows(op, "margin", margin, margin, margin.dtype)
    check_choice(op, "normalize", normalize, MARGIN_NORMALIZES)
    slope, bias = _single(op, "slope", slope, margin), _single(op, "bias", bias, margin)
    return _mail_weights(margin, slope, bias, normalize)


def probabilistic_margin(
    logits: Tensor, y: Tensor, logits_adv: Tensor | None = None, kind: MarginName = "nat"
) -> Tensor:
    """Return MAIL's margin of each row, (B,) in [-1, 1], float32 (float64 for float64).

    With p and q the softmax of `logits` and `logits_adv` and max over the classes j != y:
    "nat": p_y - max p_j; "adv": q_y - max q_j (what the official code uses); "dif":
    p_y - max q_j; "dif_conf": p_y - q_y, which grows with vulnerability, unlike the others. The
    abstract fits "dif"; a third-party code implements "dif_conf" under that name.

    Args:
        logits: (B, C) finite logits of the clean inputs.
        y: (B,) int64 labels. A row whose label is not a class, or with a logit that is not finite,
            gives NaN.
        logits_adv: (B, C) logits of the perturbed inputs, for every kind but "nat".

    Raises:
        TypeError: another dtype. ValueError: wrong shapes or devices, an unknown kind, or
            `logits_adv` missing.

    Source: Liu et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training"
    (NeurIPS 2021), equations 4 to 6.
    """
    op = "probabilistic_margin"
    check_choice(op, "kind", kind, MARGINS)
    _check_logits_and_labels(op, "logits", logits, y)
    if kind == "nat":
        return row_stats(logits, y).prob_margin
    if logits_adv is None:
        raise ValueError(f"{op}: kind={kind!r} needs logits_adv")
    check_like(op, "logits", logits, logits_adv=logits_adv)
    if kind == "adv":
        return row_stats(logits_adv, y).prob_margin
    p_y, q_y = _probability(logits, y), _probability(logits_adv, y)
    return p_y - q_y if kind == "dif_conf" else p_y - q_y + row_stats(logits_adv, y).prob_margin


def _probability(logits: Tensor, y: Tensor) -> Tensor:
    """Return the softmax probability of the label of each row."""
    return torch.exp(-weighted_cross_entropy(logits.detach(), y))


def _single(op: str, name: str, value: float | Tensor, rows: Tensor) -> Tensor:
    """Return a parameter that must be one number."""
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(
            f"{op}: {name} must be a float or a 0-dim tensor, got shape {list(value.shape)}"
        )
    return parameter(op, name, value, rows)
