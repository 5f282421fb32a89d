"""What people see before and while an evaluation runs."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyadv.attacks import progress
from pyadv.attacks.progress import Lines, Watch, duration
from pyadv.evaluation import check_masking, estimate, evaluate, measure_margins, run_suite
from pyadv.evaluation.document import BUDGET, SUITE_PARTS, shares
from pyadv.evaluation.estimate import Cost, Stage, stages, work

EPS = 0.03


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    x = torch.rand(24, 1, 8, 8)
    y = net(x).argmax(1)
    y[:6] = (y[:6] + 1) % 4
    return net, x, y


@pytest.mark.parametrize("norm", ["Linf", "L1"])
def test_the_expected_work_is_what_the_suites_do(problem, norm: str) -> None:
    """Expected gradient steps and forward passes against those that were counted."""
    net, x, y = problem
    eps = {"Linf": EPS, "L1": 1.0}[norm]
    common = {"eps": eps, "norm": norm, "progress": None}
    report = evaluate(net, x, y, **common)
    correct, robust = (int(row.correct.sum()) for row in (report["clean"], report.worst))
    assert 0 < robust < correct < len(x)

    def expected(part: str, gradient: bool) -> float:
        parts = work(stages(part, eps, norm, classes=4), correct, robust)
        return sum(rows * s.steps for s, rows in parts if s.gradient == gradient)

    reports = {"pgd20": report, "pgdplus": evaluate(net, x, y, attacks="pgdplus", **common)}
    counted = {
        name: float(sum(row.gradients.sum() for row in found.rows))
        for name, found in reports.items()
    }
    if norm == "Linf":
        masking = check_masking(net, x, y, **common)
        counted["masking"] = masking.gradients * len(x)
        counted["margins"] = float(measure_margins(net, x, y, progress=None).gradients.sum())
        forward = (masking.queries - masking.gradients) * len(x)
        assert 0.5 < expected("masking", False) / forward < 2
    for part, steps in counted.items():
        assert 0.5 < expected(part, True) / steps < 2, part


def test_every_part_of_a_suite_has_an_estimate() -> None:
    parts = {part for suite in SUITE_PARTS for part in shares(suite, 9)}
    found = {part: stages(part, EPS, "Linf", classes=4) for part in parts}
    assert all(found.values())
    members = [(s.steps, s.attempts, s.gradient) for s in found["autoattack"]]
    assert members == [(100, 1, True), (100, 3, True), (100, 3, True), (5000, 1, False)]
    assert {s.weight for s in stages("autoattack-rand", EPS, "Linf", classes=4)} == {20}
    assert found["pgdplus"] == (Stage(40, attempts=5),)


def test_an_estimate_follows_the_model_the_samples_and_the_processes(problem, monkeypatch) -> None:
    net, x, y = problem
    module = sys.modules["pyadv.evaluation.estimate"]
    timed = []

    def seconds(attack: Callable[[int], object], n: int, device: torch.device) -> float:
        attack(n)
        timed.append(n)
        return 0.001 + 0.002 * n  # of one step

    monkeypatch.setattr(module, "_seconds", seconds)
    samples = {"pgd20": 48, "autoattack": 24}
    found = estimate(net, x, y, samples, eps=EPS, batch_size=20)
    assert timed == [8, 16, 20] * 2 and set(found) == set(samples)
    looked = x[:20], y[:20]
    report = evaluate(net, *looked, eps=EPS, progress=None)
    share = report.worst.correct.double().mean().item()
    rows = round(48 * share)
    assert found["pgd20"] == pytest.approx(60 * (math.ceil(rows / 20) * 0.001 + rows * 0.002))
    three = estimate(net, x, y, samples, eps=EPS, batch_size=20, processes=3)
    rows = round(16 * share)
    assert three["pgd20"] == pytest.approx(60 * (math.ceil(rows / 20) * 0.001 + rows * 0.002))
    monkeypatch.undo()
    assert all(0 < v < 600 for v in estimate(net, x, y, samples, eps=EPS).values())
    assert Cost(0.5, 0.01).of(1001, 3, batch_size=500) == pytest.approx(3 * (1.5 + 10.01))


def test_a_budget_takes_the_first_samples_and_says_so(problem) -> None:
    net, x, y = problem
    x, y = x[6:16], y[6:16]
    common = {"eps": EPS, "progress": None, "batch_size": 16}
    document = run_suite("margins", net, x, y, budget={"margins": 2, "pgd20": 9}, **common)
    assert len(document.margins) == 2 and document.reports["pgd20"].n == 9
    assert document.left_out == (
        "pgd20 has the first 9 of 10 samples.",
        "margins has the first 2 of 10 samples.",
    )
    assert document.to_dict()["left_out"] == list(document.left_out)
    assert "margins has the first 2 of 10 samples" in document.to_markdown({})
    assert run_suite("pgd20", net, x[:2], y[:2], budget=BUDGET, **common).left_out == ()
    assert shares("all", 10_000, BUDGET)["autoattack"] == 100
    with pytest.raises(ValueError, match="suite must be one of pgd20, .*got 'al'"):
        shares("al", 5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (150, "2 min 30 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_every_ten_seconds_without_a_terminal(capsys, monkeypatch) -> None:
    clock = iter([0, 4, 12, 13, 25, 26])
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    lines = Lines()
    for done in (1, 2, 3, 4, 5, 6):
        lines("pgd", done, 6, 6 - done)
    printed = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"(\d+) / 6", line)[1]) for line in printed] == [3, 5, 6]


def test_a_watch_speaks_while_a_batch_lasts(capsys) -> None:
    with Watch(expected=100.0, every=0.02) as watch:
        time.sleep(0.1)
        watch("apgd\nt", 4, 64, 60)
        time.sleep(0.1)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "no batch is complete yet; 0 s gone, about 1 min 40 s to go"
    assert printed[-1] == (
        "apgd t: 4 / 64 samples done, 60 not broken so far; 0 s gone, about 1 min 40 s to go"
    )
    assert watch.line(130.0).endswith("2 min 10 s gone, longer than expected")
    time.sleep(0.05)
    assert capsys.readouterr().err == ""  # the thread has ended
