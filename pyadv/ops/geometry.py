"""Geometry values (how many iterates of an attack a sample survives) and early stop."""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import check_rows, refuse_overlap
from pyadv.ops.registry import no_output, register

_track = register(
    "track(Tensor correct, Tensor(a!) kappa, Tensor(b!) active, Tensor(c!) patience) -> ()",
    reference.track,
    no_output,
)


def track(correct: Tensor, kappa: Tensor, active: Tensor, patience: Tensor) -> None:
    """Update kappa, active and patience in place after one iterate of an attack.

    In an active row that is correct, kappa grows by 1. In an active row that is not, patience
    drops by 1, or, if it is 0 already, the row is released (active becomes False). A correct
    iterate does not restore patience. Inactive rows do not change.

    If `track` is called before each step of an attack of K steps, kappa becomes GAIRAT's geometry
    value in {0, ..., K}. A patience that starts at tau gives FAT's early stop: tau = K never stops,
    tau = 0 stops at the first misclassified iterate.

    Args:
        correct: (B,) bool, whether the current iterate is classified as its label.
        kappa: (B,) int64, changed.
        active: (B,) bool, changed.
        patience: (B,) int64, >= 0, changed.

    Raises:
        TypeError: another dtype. ValueError: shapes or devices differ, or memory is shared.

    Sources: Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training" (ICLR 2021),
    algorithm 1; Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning
    Stronger" (ICML 2020), algorithm 1.
    """
    check_rows("track", "correct", correct, correct, torch.bool)
    check_rows("track", "kappa", kappa, correct, torch.int64)
    check_rows("track", "active", active, correct, torch.bool)
    check_rows("track", "patience", patience, correct, torch.int64)
    for name, t, others in (
        ("kappa", kappa, (patience,)),
        ("active", active, (correct,)),
        ("patience", patience, ()),
    ):
        refuse_overlap("track", name, t, others)
    unchecked_track(correct, kappa, active, patience)


def unchecked_track(correct: Tensor, kappa: Tensor, active: Tensor, patience: Tensor) -> None:
    """Run `track` without checks, for a loop that made the tensors itself."""
    _track(correct, kappa, active, patience)
    torch.autograd.graph.increment_version((kappa, active, patience))
