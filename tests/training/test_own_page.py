"""The page "Your own model and data" runs as it stands."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pages
import pytest
from typer.testing import CliRunner

from pyadv.cli import app

pytest.importorskip("PIL")
pytestmark = pytest.mark.skipif(not (pages.ROOT / "docs").is_dir(), reason="not a checkout")


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
    outputs: dict[str, str] = {}
    page = pages.run(
        "docs/own-model-and-data.md", shell=lambda line: outputs.update({line: run(line)})
    )
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
