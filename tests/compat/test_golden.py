"""`pyadv.compat` against the results of the authors' own files, see make_golden.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyadv.compat import emr, fat, gairat, mail, mart, trades
from pyadv.compat._official import linf_attack, normal_start
from pyadv.objectives import GAIRRST

_spec = importlib.util.spec_from_file_location(
    "make_golden", Path(__file__).with_name("make_golden.py")
)
make_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_golden)


def gair_trades_loss(
    model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta, adversarial, distance,
    entropy_weight, Lambda,
):  # fmt: skip
    """Call the objective with the official function's arguments and the official attacks."""
    assert adversarial and distance == "l_inf" and entropy_weight == 0
    losses = ("kl", gairat._cw_rows)
    attacks = [
        linf_attack(loss, normal_start, epsilon, step_size, perturb_steps) for loss in losses
    ]
    model.train()
    optimizer.zero_grad()
    return GAIRRST(*attacks, beta, Lambda)(model, x_natural, y), None


def emr_penalty(model, x_adv, temperature):
    if isinstance(model, make_golden.SelfModed):
        model = emr.official(model)
    return emr.emr_penalty(model, x_adv, temperature)


OURS = SimpleNamespace(
    trades_loss=trades.trades_loss,
    mart_loss=mart.mart_loss,
    mail_loss=mail.mail_loss,
    PM=mail.PM,
    GAIR=gairat.GAIR,
    GA_PGD=gairat.GA_PGD,
    GA_earlystop=gairat.GA_earlystop,
    earlystop=fat.earlystop,
    eval_clean=gairat.eval_clean,
    eval_robust=gairat.eval_robust,
    GAIR_trades_loss=gair_trades_loss,
    emr_penalty=emr_penalty,
)
CASES = make_golden.cases()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(make_golden.GOLDEN.read_text())


def test_every_case_is_there(golden):
    assert list(golden["cases"]) == list(CASES)
    assert golden["made by"]["sources"] == make_golden.SOURCES


@pytest.mark.parametrize("name", CASES)
def test_the_authors_numbers(name, golden):
    float32_weights = "GAIR" in name and "GA_" not in name  # in the official code, too
    rtol = 1e-5 if name.startswith("float32") or float32_weights else 1e-7
    expected = golden["cases"][name]
    found = CASES[name](OURS)
    assert list(found) == list(expected)
    _assert_close(name, found, expected, rtol)


def _assert_close(name: str, found: Any, expected: Any, rtol: float) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            _assert_close(f"{name} {key}", found[key], expected[key], rtol)
    else:
        a, b = (torch.tensor(v, dtype=torch.float64) for v in (found, expected))
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m: f"{name}: {m}")
