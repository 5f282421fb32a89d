"""`pyadv.compat` against what the authors' own files computed, see make_golden.py."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyadv.compat import emr, fat, gairat, mail, mart, trades

_spec = importlib.util.spec_from_file_location(
    "make_golden", Path(__file__).with_name("make_golden.py")
)
make_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_golden)

OURS = SimpleNamespace(
    trades_loss=partial(trades.trades_loss, official_passes=True),
    mart_loss=mart.mart_loss,
    mail_loss=mail.mail_loss,
    PM=mail.PM,
    GAIR=gairat.GAIR,
    GA_PGD=gairat.GA_PGD,
    GA_earlystop=gairat.GA_earlystop,
    earlystop=fat.earlystop,
    emr_penalty=emr.emr_penalty,
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
    rtol = 1e-5 if name.startswith(("float32", "GAIR")) else 1e-7
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
