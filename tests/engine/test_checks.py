"""Attacks refuse invalid arguments with a clear message."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import RowLinear

from pyadv import attacks
from pyadv.engine import checks

TARGETED = [
    *(attacks.PGD, attacks.FriendlyPGD, attacks.FGSM, attacks.MIFGSM, attacks.APGD),
    *(attacks.Square, attacks.CW, attacks.DDN, attacks.FMN),
]


@pytest.mark.parametrize("kind", TARGETED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", ["False", "True", 0, 1, None, torch.tensor(True)], ids=repr)
def test_targeted_is_a_bool(kind, value):
    with pytest.raises(TypeError, match="targeted must be True or False, got"):
        kind(RowLinear(5), targeted=value)
    assert kind(RowLinear(5), targeted=True).settings.loss.targeted is True


def test_counts_are_integers_of_any_type():
    for value in (3, np.int64(3), np.uint8(3), np.array(3)[()]):
        assert checks.count("steps", value, 1) == 3 and type(checks.count("steps", value, 1)) is int
    for value in (True, np.True_, 3.0, "3", None, 0, np.int64(0), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"steps must be an integer >= 1, got"):
            checks.count("steps", value, 1)


def test_first_logits_need_an_answer_in_every_row():
    z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    z[0, 1:] = -math.inf
    checks.logits(z, y)
    for value in (math.nan, math.inf):
        bad = z.clone()
        bad[1, 2] = value
        with pytest.raises(ValueError, match="no NaN, no .inf and one class.* but 1 of 3 samples"):
            checks.logits(bad, y)
    z[1:] = -math.inf
    with pytest.raises(ValueError, match="but 2 of 3 samples break this"):
        checks.logits(z, y)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((attacks.FAB, n) for n in ("beta", "alpha_max")),
        *((attacks.DIFGSM, n) for n in ("diversity", "resize")),
        (attacks.DDN, "gamma"),
        (attacks.Square, "p"),
    ],
)
@pytest.mark.parametrize("value", [None, "0.5", [0.5], True])
def test_shares_are_numbers(kind, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
        kind(**{name: value})
