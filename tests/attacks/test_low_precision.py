"""In 16 bits the result lies in the ball too: rounding goes towards x."""

from __future__ import annotations

import pytest
import torch
from networks import RowLinear

from pyadv import attacks
from pyadv.attacks import (
    APGD,
    FGSM,
    MIFGSM,
    PGD,
    PGD0,
    FriendlyPGD,
    PGDPlus,
    Square,
    TargetedAPGD,
    TransferFGSM,
)
from pyadv.attacks.minimum_norm import MinimumNorm
from pyadv.engine.attack import Attack
from pyadv.engine.rounding import round_inward_

ORDERS = {"Linf": torch.inf, "L2": 2, "L1": 1}
KINDS = [PGD, FGSM, MIFGSM, TransferFGSM, FriendlyPGD, PGDPlus, APGD, TargetedAPGD, Square]


def lengths(x_adv, x, norm):
    return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), ORDERS[norm], dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_lies_in_the_ball(kind, norm, dtype):
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(16) % 3
    short = {"queries": 8} if kind is Square else {} if kind is FGSM else {"steps": 4}
    for eps in (8 / 255, 0.1) if norm == "Linf" else (0.5, 2.0):
        attack = kind(RowLinear(192, dtype=dtype), norm=norm, eps=eps, seed=0, **short)
        x_adv = attack(x, y)
        assert x_adv.dtype == dtype and (x_adv >= 0).all() and (x_adv <= 1).all()
        length = lengths(x_adv, x, norm)
        assert (length <= eps).all()
        assert length.max() > 0.8 * eps  # and not far inside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_rows_inside_stay_and_rows_outside_move_little(norm, dtype):
    torch.manual_seed(0)
    x = (4 * torch.rand(40, 50) - 2).to(dtype)
    delta = torch.randn(40, 50)
    eps = torch.rand(40) + 0.05
    size = torch.linalg.vector_norm(delta, ORDERS[norm], dim=1)
    scale = torch.where(torch.arange(40) < 30, 1.0, 0.5)
    x_adv = (x.float() + delta / size[:, None] * (eps * scale)[:, None]).to(dtype)
    before = x_adv.clone()
    inside = lengths(before, x, norm) <= eps.double()
    assert inside[30:].all() and not inside[:30].all()
    active = torch.arange(40) != (~inside).nonzero()[0]
    round_inward_(x_adv, x, eps, norm, active)
    assert (lengths(x_adv, x, norm) <= eps.double())[active].all()
    assert torch.equal(x_adv[inside | ~active], before[inside | ~active])
    spacing = 2 * torch.finfo(dtype).eps  # of numbers up to 4
    assert ((x_adv.float() - before.float()).abs() <= 1.01 * spacing).all()
    order = ORDERS[norm]
    lost = torch.linalg.vector_norm(torch.full((50,), spacing, dtype=torch.float64), order)
    assert (lengths(x_adv, x, norm) >= lengths(before, x, norm) - lost).all()
    again = x_adv.clone()
    round_inward_(again, x, eps, norm)
    assert torch.equal(again[active], x_adv[active])


def test_the_list_is_complete():
    exported = {v for v in vars(attacks).values() if isinstance(v, type) and issubclass(v, Attack)}
    others = exported - set(KINDS) - {PGD0}  # which counts entries
    assert all(issubclass(k, (MinimumNorm, TransferFGSM)) for k in others)
