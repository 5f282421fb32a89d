"""The page "Your own model and data" runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyadv.cli import app

pytest.importorskip("PIL")
PAGE = Path(__file__).parents[2] / "docs" / "own-model-and-data.md"
BLOCK = re.compile(r"```(python|bash)(?: title=\"(.*?)\")?\n(.*?)```", re.DOTALL)


def run(line: str) -> str:
    program, *arguments = shlex.split(line)
    assert program == "pyadv"
    place = ["--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *place], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    page, outputs = types.ModuleType("page"), {}
    for kind, title, block in BLOCK.findall(PAGE.read_text()):
        if title:
            Path(title).write_text(block)
        elif kind == "python":
            exec(compile(block, "own-model-and-data.md", "exec"), page.__dict__)
        else:
            outputs |= {line: run(line) for line in block.strip().splitlines()}
    for name in ("mynet", "mydata", "myvit"):
        sys.modules.pop(name, None)

    runs = {
        name: Path("runs") / name for name in ("tones", "mydata", "streamed", "own-parts", "vit")
    }
    assert all((folder / "results.json").exists() for folder in runs.values())
    config = json.loads((runs["tones"] / "config.json").read_text())
    assert config["epochs"] == 3 and config["model_args"] == {"width": 4}
    text = {name: out for line, out in outputs.items() for name in runs if f"runs/{name}" in line}
    (named,) = (out for line, out in outputs.items() if "mynet.pt" in line)
    assert "written to evaluation/mynet.Net-pgd20" in named
    assert "tones is streamed by 1 workers" in text["streamed"]
    assert "EMR by finite differences" in text["vit"]
    assert len(page.losses.losses) == 8 and page.report.n == 8
    assert page.run.config.method == "trades"
