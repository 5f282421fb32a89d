"""The benchmarks run, refuse wrong results and write their page. No test depends on a time."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not a checkout")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def harness():
    return importlib.import_module("harness")


@pytest.fixture
def options(harness):
    return harness.Options(torch.device("cpu"), threads=1, quick=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all questions, asked through the command line."""
    folder = tmp_path_factory.mktemp("results") / "some-cpu-2026-01-01"
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--out", folder]
    done = subprocess.run(
        [*map(str, command), "--against", "none"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for word in ("linf_step in place", "AT + EMR", "AutoAttack standard", "a process that imports"):
        assert word in done.stdout
    return folder


def test_every_row_has_what_the_page_shows(harness, results):
    for name in importlib.import_module("questions").QUESTIONS:
        environment, rows = harness.load(results / f"{name}.json")
        assert environment["torch"] == torch.__version__ and environment["heap"] == "tuned"
        assert rows and not any(r.refused for r in rows)
        for row in rows:
            assert len(row.times_us) == 2 and min(row.times_us) > 0
            assert any((r.case, r.provider) == (row.case, row.ours) for r in rows)
        if name == "attacks":
            floors = {r.case: r for r in rows if r.provider == "floor"}
            for row in rows:  # PGD makes exactly the passes of the floor
                if row.case.startswith("PGD") and row.provider in ("pyadv", "eager"):
                    floor = floors[row.case]
                    assert (row.forwards, row.backwards) == (floor.forwards, floor.backwards)


def test_page(harness, results, tmp_path, monkeypatch):
    render = importlib.import_module("render")
    monkeypatch.setattr(render, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(render, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / results.name).symlink_to(results)
    render.main()
    first = (tmp_path / "docs" / "benchmarks.md").read_text()
    page = (tmp_path / "docs" / "benchmarks-in-full.md").read_text()
    pictures = list((tmp_path / "docs" / "images").iterdir())
    assert pictures and all(f"images/{p.name}" in first + page for p in pictures)
    # Every goal has a line, also if these small cases do not measure it.
    for name in importlib.import_module("questions").QUESTIONS:
        for goal in getattr(importlib.import_module(name), "GOALS", []):
            assert f"| {goal.text} |" in page


def test_the_pages_are_those_of_the_committed_results(tmp_path, monkeypatch):
    render = importlib.import_module("render")
    monkeypatch.setattr(render, "DOCS", tmp_path)
    render.main()
    for name in ("benchmarks.md", "benchmarks-in-full.md"):
        page = (tmp_path / name).read_text()
        assert page == (BENCHMARKS.parent / "docs" / name).read_text(), "run benchmarks/render.py"
    first = (tmp_path / "benchmarks.md").read_text()
    assert first.count("images/first-") == 3 and "Goals" not in first  # what users ask for


def test_strength(harness, tmp_path, monkeypatch):
    """The question without times runs through the command line and has a page of its own."""
    folder = tmp_path / "results" / "some-cpu-2026-01-01"
    command = [sys.executable, BENCHMARKS / "run.py", "strength", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*map(str, command), "--against", "none", "--out", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    strength = importlib.import_module("strength")
    _, rows = harness.load(folder / "strength.json")
    assert not any(r.refused for r in rows)
    kinds = {(norm, kind) for norm in strength.NORMS for kind in (strength.FIXED, strength.NEAREST)}
    assert {r.group for r in rows} == {f"{norm}, {kind}" for norm, kind in kinds}
    assert len({r.case for r in rows}) == 5 * len(kinds)
    for row in rows:
        assert row.forwards > 0 and (row.backwards or "Square" in row.provider)
        assert 0 <= row.facts.get("robust", 0) <= 100 and row.facts.get("ratio", 1) >= 1

    render = importlib.import_module("render")
    monkeypatch.setattr(render, "DOCS", tmp_path)
    monkeypatch.setattr(render, "HERE", tmp_path)
    render.main()
    page = (tmp_path / "strength.md").read_text()
    assert "| **pyadv PGD0** |" in page and page.count("| forward | backward |") == len(kinds)
    assert "**Where pyadv loses**\n\nNowhere." in page  # without peers


def test_a_loss_of_strength_is_named(harness):
    """By a peer's attack of the same name, and by the strongest peer of all."""
    strength = importlib.import_module("strength")

    def row(provider, ours, ratio, found=100.0):
        facts = {"ratio": ratio, "median": 1.0, "found": found}
        own = provider.startswith("pyadv")
        return harness.Row(
            "case",
            provider,
            ours,
            1,
            "L2, the nearest point",
            2,
            peer=not own,
            forwards=4,
            facts=facts,
        )

    rows = [row("pyadv FMN", "pyadv FMN", 1.0), row("a FMN", "pyadv FMN", 1.2)]
    assert "Nowhere." in strength.text(rows)
    rows += [row("pyadv CW", "pyadv CW", 1.1), row("a CW", "pyadv CW", 1.0, 50.0)]
    assert "Nowhere." in strength.text(rows)  # it finds fewer
    rows += [row("b CW", "pyadv CW", 1.05), row("b new", "pyadv new", 0.9)]
    text = strength.text(rows)
    assert "- case: b CW 1.050, pyadv CW 1.100" in text
    assert "- case: b new 0.900, pyadv FMN 1.000" in text


def test_points_that_are_no_success(harness):
    """Points outside the box, and points that the network still classifies correctly."""
    strength = importlib.import_module("strength")
    x = torch.full((3, 1, 2, 2), 0.5)
    y = torch.zeros(3, dtype=torch.int64)

    def model(v):
        f = v.flatten(1)[:, 0] - 0.6
        return torch.stack([-f, f], 1)

    x_adv = x.clone()
    x_adv[0, 0, 0, 0], x_adv[1, 0, 0, 0], x_adv[2, 0, 0, 0] = 0.7, 1.1, 0.55
    victim = strength.Victim("name", model, x, y, {"L2": 0.1})
    found = strength._distances(victim, x_adv, "L2")
    torch.testing.assert_close(found, torch.tensor([0.2, torch.inf, torch.inf]))
    contest = strength.Contest(victim, "L2", strength.FIXED, {})
    assert strength._facts(contest, found, found) == {"robust": 100.0}


def test_modules_import_one_way():
    """The driver may import the page, and neither the page nor a question imports the driver."""
    imported = {}
    for path in BENCHMARKS.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found = imported[path.stem] = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    reached: dict[str, set[str]] = {}

    def below(name: str, path: tuple[str, ...] = ()) -> set[str]:
        assert name not in path, f"a cycle: {(*path, name)}"
        if name not in reached:
            direct = imported[name] & imported.keys()
            reached[name] = direct.union(*(below(n, (*path, name)) for n in direct))
        return reached[name]

    for name in imported:
        below(name)
    assert "render" in reached["run"] and "run" not in reached["render"]


def test_the_page_shows_a_card(harness, tmp_path, monkeypatch):
    """Rows of a card need neither peers nor a duration, and have goals of their own."""
    render = importlib.import_module("render")
    folder = tmp_path / "results" / "some-card-2026-01-01"
    known = dict(device="Some card", cuda="13.0", driver="1", processor="p", cores=1, torch="2")
    known |= dict(python="3", pyadv="0", kernels="native", commit="c", changed=False)
    known |= dict(heap="default", load=0.0, date="2026-01-01")
    name = "PGD, 10 steps, ResNet-18, batch 128"
    rows = [
        harness.Row(name, p, "pyadv", 1, images=1, yardstick=p == "floor", times_us=[t])
        for p, t in (("pyadv", 1.0), ("floor", 1.0))
    ]
    harness.save(folder / "gpu_attacks.json", known, rows)
    monkeypatch.setattr(render, "DOCS", tmp_path)
    monkeypatch.setattr(render, "HERE", tmp_path)
    render.main()
    page = (tmp_path / "benchmarks-in-full.md").read_text()
    assert "CUDA 13.0, driver 1" in page and "### Attacks on a GPU" in page
    assert "batch 128, pyadv: 1.06 of the recorded floor | 1 | <= 1.06 | 1 | met |" in page
    assert "Linf step" not in page
    first = (tmp_path / "benchmarks.md").read_text()
    assert f"| {name} | Some card at c | **1 us** |  |  |  |" in first  # the floor is no other code


def test_other_work_is_not_the_fastest_other_code(harness, tmp_path):
    """torchattacks' AutoAttack runs a tenth of the iterations, so its time is no rival's."""
    front = importlib.import_module("front")
    case = "AutoAttack standard, SmallCNN, 100 images"
    rows = [
        harness.Row(case, provider, "pyadv", 1, times_us=[time])
        for provider, time in (("pyadv", 2e6), ("torchattacks", 1e6), ("pyautoattack", 3e6))
    ]
    environment = {"device": "Some CPU", "commit": "c", "changed": False}
    page = "".join(front.page([{"evaluation": (environment, rows)}], tmp_path))
    assert f"| {case} | Some CPU at c | **2 s** |  | pyautoattack: 3 s | 1.50 |" in page


def test_a_wrong_result_is_not_timed(harness, options):
    right = torch.arange(3.0)
    case = harness.Case(
        "case",
        {
            "pyadv": lambda: right,
            "wrong": lambda: right + 1e-3,
            "raises": harness.Provider(lambda: 1 / 0, peer=True),
            "other": harness.Provider(lambda: None, yardstick=True),
        },
        harness.close(right, atol=1e-6),
    )
    rows = {r.provider: r for r in harness.measure(case, options)}
    assert rows["wrong"].refused == "differs from the reference by 0.001"
    assert rows["raises"].refused == "ZeroDivisionError: division by zero"
    assert not rows["wrong"].times_us and not rows["raises"].times_us
    assert len(rows["pyadv"].times_us) == len(rows["other"].times_us) > 0


def row(harness, provider, times, **more):
    return harness.Row("case", provider, "pyadv", threads=1, times_us=times, **more)


@pytest.mark.parametrize(
    "bound, value, met",
    [
        ({"at_most": 0.5}, 0.5, True),
        ({"at_most": 0.4}, 0.5, False),
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.1}, 2.0, False),
        ({"beyond_s": 0.0}, -2e-6, True),
    ],
)
def test_goals_are_judged_round_by_round(harness, bound, value, met):
    # The rounds of a disturbed machine, where the ratio of the medians would be 1.0.
    rows = [row(harness, "pyadv", [1.0, 4.0, 2.0]), row(harness, "other", [2.0, 8.0, 4.0])]
    goal = harness.Goal("goal", "case", "other", **bound)
    assert goal.outcome(rows, 1) == (pytest.approx(value), met)
    assert goal.outcome(rows, 2) is None


def test_peers_means_the_fastest_of_them(harness):
    rows = [row(harness, "pyadv", [3.0]), row(harness, "other", [1.0])]
    rows += [row(harness, name, [t], peer=True) for name, t in (("slow", 6.0), ("quick", 4.0))]
    goal = harness.Goal("goal", "case", "peers", at_least=1.5)
    assert goal.outcome(rows, 1) == (pytest.approx(4 / 3), False)


def test_peak_memory_is_that_of_tensors(harness, options):
    x = torch.zeros(1000)
    case = harness.Case("case", {"pyadv": lambda: ((x + 1) * 2).sum()}, None)
    (found,) = harness.measure(case, options)
    assert 2 * x.nbytes <= found.peak_bytes < 2 * x.nbytes + 1000


def test_passes_are_counted_in_samples():
    problems = importlib.import_module("problems")
    model, x = problems.Free(), torch.rand(5, 1, 4, 4)
    counted, _ = problems.count("floor", model, lambda m: problems.floor(m, x, 3))
    assert counted == (15, 15)


def test_command(monkeypatch):
    """`pyadv bench` runs the driver in a separate process, which sets up its heap."""
    typer_testing = pytest.importorskip("typer.testing")
    from pyadv import cli

    calls = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: calls.append(command) or 3)
    result = typer_testing.CliRunner().invoke(cli.app, ["bench", "ops", "--quick", "--out", "here"])
    assert result.exit_code == 3
    script = str(BENCHMARKS / "run.py")
    assert calls == [
        [sys.executable, script, "ops", "--against", "peers", "--quick", "--out", "here"]
    ]


def test_strength_of_fast_views_in_both_forms(options):
    module = importlib.import_module("fast_strength")
    results = list(module.measure(options, images=20))
    assert [r.speed for r in results] == ["exact", *2 * ["fast", "bfloat16", "float16"]]
    assert {r.form for r in results[4:]} == {"GPU, on the CPU"}
    for r in results:
        assert 0 <= r.success <= 100 and r.differs <= 1
    assert module.table(results).count("\n") == 8
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), torch.rand(2, 4)
    from pyadv.attacks import fast_view
    from pyadv.passes import view

    with module.as_on_a_gpu():
        assert fast_view(model.eval(), x).fused
    view._views.clear()
    assert not fast_view(model, x).fused


@pytest.mark.parametrize(
    "given, said",
    [
        (["atacks"], "questions are ops, .*; got atacks; did you mean 'attacks'"),
        (["ops", "--against", "foolbx"], "cannot import foolbx; .*did you mean 'foolbox'"),
    ],
)
def test_misspelt_names_are_told_the_nearest(given, said):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "run.py", *given, "--quick", "--out", "never-made"],
        capture_output=True,
        text=True,
    )
    assert done.returncode and re.search(said, done.stderr), done.stderr
