"""The example scripts and the notebook run, on few images."""

from __future__ import annotations

import json
import runpy
import sys
import types

import pages
import pytest

EXAMPLES = pages.ROOT / "examples"
pytestmark = pytest.mark.skipif(not (pages.ROOT / "docs").is_dir(), reason="not a checkout")
# script -> options of a run that takes a second or two, and a file that it must write
RUNS = {
    "train_robustly": (["--method", "gairat", "--epochs", "2", "--images", "200"], "model.pt"),
    "attack_a_model": (["--weights", "../train_robustly/model.pt"], "examples.png"),
    "evaluate_with_autoattack": (
        ["--weights", "../train_robustly/model.pt", "--images", "4"],
        "autoattack.state",
    ),
    "is_it_robust": (["--weights", "../train_robustly/model.pt", "--images", "4"], "margins.csv"),
    "your_own_loss": (["--images", "300"], None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for all scripts: one writes the weights that the others read."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", RUNS)
def test_a_script(name, folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    options, written = RUNS[name]
    (folder / name).mkdir()
    if options[:1] == ["--weights"] and not (folder / "train_robustly" / "model.pt").is_file():
        test_a_script("train_robustly", folder, monkeypatch, capsys)
    monkeypatch.chdir(folder / name)
    pages.hasten_margins(monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
    assert written is None or (folder / name / written).stat().st_size > 0


def test_every_script_is_run_and_described():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(RUNS)
    page = (pages.ROOT / "docs" / "examples.md").read_text()
    for name in (*(f"{script}.py" for script in scripts), "tour.ipynb"):
        assert name in page
    for script in scripts:
        text = (EXAMPLES / f"{script}.py").read_text()
        assert f"python examples/{script}.py" in text and len(text.splitlines()) <= 70


def test_the_notebook(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    display = types.ModuleType("IPython.display")
    display.Image = lambda path: (tmp_path / path).read_bytes()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    names: dict = {}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            for piece, less in (
                ("images = 3000", "images = 200"),
                ("[:200]", "[:16]"),
                ("slice(0, 10)", "slice(0, 2)"),
                ("epochs=3", "epochs=1"),
            ):
                code = code.replace(piece, less)
            exec(compile(code, f"tour.ipynb, cell {i}", "exec"), names)
    assert names["images"] == 200 and len(names["report"].worst.correct) == 2
    assert "withstand PGD-20" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"worst.png", "accuracy.png"}
