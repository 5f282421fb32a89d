"""The statistics of the checks for gradient masking: paired differences, their intervals, and the
thresholds from which a check is suspicious."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A check is suspicious if the lower end of the interval of `difference` is above its threshold.
SURE = 2.0  # standard errors below: 1 honest model in 40 at the threshold raises an alarm
# What another loss or another scale of the logits may gain. On CIFAR-10, adversarial training and
# TRADES lose at most 4 points from PGD-20 to AutoAttack, GAIRAT 14 to the margin loss alone.
OTHER_LOSS = 0.04
# What more steps, other starts and a larger radius may change: less than 1 point on honest models.
STEADY = 0.02
# Share of samples broken only without the model's gradients, or without a gradient. AutoAttack
# warns at 0.2 %, but after attacks of thousands of passes.
HIDDEN = 0.01


def difference(more: Tensor, fewer: Tensor | None = None) -> float:
    """Return the lower end of the interval of share(more) - share(fewer), `SURE` standard errors
    below the difference.

    Half a sample is added to each of the four counts; otherwise small and one-sided samples would
    seem certain (Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005).

    Args:
        more, fewer: (N,) bool for the same samples; without `fewer` the share of `more` alone.
    """
    fewer = torch.zeros_like(more) if fewer is None else fewer
    n = len(more) + 2
    up, down = ((int((a & ~b).sum()) + 0.5) / n for a, b in ((more, fewer), (fewer, more)))
    return (up - down) - SURE * math.sqrt((up + down - (up - down) ** 2) / n)


def smallest_difference(n: int, threshold: float) -> float:
    """Return the least share of n samples, all changing in one direction, for which `difference`
    exceeds the threshold; 1 if even all of them do not suffice."""
    for k in range(1, n + 1):
        if difference(torch.arange(n, device="cpu") < k) > threshold:
            return k / n
    return 1.0


def share(rows: Tensor) -> float:
    """Return the share of True in (N,) bools."""
    return rows.double().mean().item()


def percent(rows: Tensor) -> str:
    """Return the share of True as text."""
    return f"{100 * share(rows):.1f} %"
