"""The comparison of the methods chooses strengths, measures, continues after an interruption, and
derives its verdicts from its numbers."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not a checkout")


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare_methods")


@pytest.fixture
def report(compare):
    return importlib.import_module("compare_methods_page")


@pytest.fixture
def made_up(compare, report, tmp_path):
    """Results of all methods with two seeds. AT has more correct answers than standard training,
    GAIRAT has fewer than AT under AutoAttack, EMR + AT has as many; MAIL collapses once."""

    def accuracy(name: str, seed: int) -> dict[str, str]:
        clean = "1" * (30 + seed) + "0" * (10 - seed)
        if (name, seed) == ("MAIL", 1):
            clean = "1" * 4 + "0" * 36
        right = {"standard": 4, "GAIRAT": 24}.get(name, 20)
        auto = {"standard": 1, "GAIRAT": 5}.get(name, 19)
        attacked = "1" * right + "0" * (40 - right)
        bits = {"clean": clean, "PGD-20": attacked, "margin PGD": attacked}
        return {**bits, "AutoAttack": ("1" * auto + "0" * 40)[:30]}

    index = []
    for name, settings in compare.METHODS.items():
        for seed in range(2):
            run = compare.run_name({**settings, "note": name}, seed)
            points = [
                {"cpu_seconds": 1.0, "weight_norm": 1.0 + e, "margin_L2": 0.5} for e in (0, 1)
            ]
            for e, point in enumerate(points):
                point |= {"logit_margin": 1.0 + e, "log_norm_product": 5.0 + e}
            measured = {"margin_Linf": 0.01 if name == "standard" else 0.05, "weight_norm": 2.0}
            if (name, seed) == ("MAIL", 1):
                measured["margin_Linf"] = None  # the network is constant
            content = {"name": run, "curve": points, "margins": measured}
            compare.write(tmp_path / f"{run}.json", {**content, "accuracy": accuracy(name, seed)})
            index.append({"name": name, "seed": seed, "run": run})
    budget = {"budget": asdict(compare.QUICK), "environment": dict.fromkeys(_ENVIRONMENT, "-")}
    compare.write(tmp_path / compare.BUDGET, budget)
    chosen = {name: grid[1] for name, grid in compare.GRIDS.items()}
    compare.write(tmp_path / compare.INDEX, {"chosen": chosen, "runs": index})
    return report.Results(tmp_path)


_ENVIRONMENT = ("processor", "torch", "pyadv", "date")


def test_it_chooses_measures_and_goes_on(compare, monkeypatch, tmp_path):
    methods = ("standard", "EMR + AT")
    monkeypatch.setattr(compare, "METHODS", {m: compare.METHODS[m] for m in methods})
    monkeypatch.setattr(compare, "GRIDS", {"EMR + AT": compare.GRIDS["EMR + AT"][:2]})
    budget = replace(compare.QUICK, seeds=1)
    out, runs = tmp_path / "out", tmp_path / "runs"
    out.mkdir()
    compare.Comparison(budget, out, runs).all()
    index = json.loads((out / compare.INDEX).read_text())
    assert [entry["name"] for entry in index["runs"]] == list(methods)
    first = {p.name: p.read_text() for p in out.iterdir()}
    assert len(first) == 4  # two strengths, the standard run, the index
    run = json.loads(first[index["runs"][1]["run"] + ".json"])
    assert run["config"]["emr"] == index["chosen"]["EMR + AT"]["emr"]
    assert {k: len(v) for k, v in run["accuracy"].items()} == {
        "clean": budget.tested,
        "PGD-20": budget.tested,
        "margin PGD": budget.tested,
        "AutoAttack": budget.autoattacked,
    }
    assert len(run["curve"]) == budget.epochs
    assert all(math.isfinite(v) for v in run["margins"].values())

    # After an interruption in AutoAttack only the missing results are computed.
    trained = {p: p.stat().st_mtime_ns for p in runs.glob("*/checkpoint.pt")}
    cut = {**run, "accuracy": {**run["accuracy"], "AutoAttack": run["accuracy"]["AutoAttack"][:2]}}
    compare.write(out / f"{run['name']}.json", cut)
    compare.Comparison(budget, out, runs).all()
    assert {p.name: p.read_text() for p in out.iterdir()} == first
    assert {p: p.stat().st_mtime_ns for p in runs.glob("*/checkpoint.pt")} == trained


def test_a_strength_that_diverges_is_not_chosen(compare, monkeypatch, tmp_path):
    grid = [{"norm_penalty": 1e9}, {"norm_penalty": 0.01}]
    monkeypatch.setattr(compare, "GRIDS", {"WEISSI": grid})
    budget = replace(compare.QUICK, epochs=3)
    assert compare.Comparison(budget, tmp_path, tmp_path / "runs").choose("WEISSI") == grid[1]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_differences_and_errors(report, made_up):
    difference, error = report.Claim("", report.PGD20, "AT", "standard").difference(made_up)
    gained = torch.tensor([0.0] * 4 + [100.0] * 16 + [0.0] * 20, dtype=torch.float64)
    assert difference == pytest.approx(40.0)  # 20 and 4 of 40, in both seeds
    assert error == pytest.approx(gained.std().item() / 40**0.5)
    _, error = report.Claim("", report.CLEAN, "AT").difference(made_up)
    share = torch.tensor([100.0] * 30 + [50.0] + [0.0] * 9, dtype=torch.float64)
    assert error == pytest.approx(math.sqrt(share.var().item() / 40 + 2.5**2 / 4))  # 75 and 77.5


def test_verdicts(report, made_up):
    def verdict(*arguments, **settings) -> str:
        return report.Claim("", *arguments, **settings).verdict(made_up)

    assert verdict(report.AUTO, "AT", "standard") == "holds"
    assert verdict(report.AUTO, "GAIRAT", "AT") == "does not hold"
    assert verdict(report.AUTO, "EMR + AT", "AT") == "undecided"
    assert verdict(report.AUTO, "EMR + AT", "AT", no_less=True) == "not contradicted"
    assert verdict(report.overstated, "GAIRAT", "AT") == "holds"
    assert verdict(report.weight_norm_growth, "standard") == "holds"
    assert verdict(report.logits_outgrow_margin, "standard") == "holds"


def test_the_page_has_every_method_and_claim(compare, report, made_up, tmp_path):
    text = report.page(made_up)
    for name in compare.METHODS:
        assert f"\n| {name} | " in text
    for claims in report.PAPERS.values():
        for claim in claims:
            assert f"| {claim.text} | " in text
    assert "nan" not in text and "{" not in text
    assert "| - | 2.00 ± 0.00 |" in text and "MAIL with seed 1." in text
    assert "uses the first 30 of them" in " ".join(text.split())
    pytest.importorskip("matplotlib")
    report.draw(made_up, tmp_path / "images" / report.PICTURE)
    assert (tmp_path / "images" / report.PICTURE).stat().st_size > 10_000
