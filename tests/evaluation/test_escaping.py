"""Names and titles may hold characters with a meaning in Markdown, tables and pictures."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pyadv.attacks import PGD, DeepFool
from pyadv.evaluation import Document, check_masking, evaluate, measure_margins
from pyadv.evaluation.escaping import code, in_picture, markdown

NAMES = ["$x_$", "a|b", "<b>", "*bold*", "two\nlines", "[link](x)", "`code`", r"\$", "_private"]


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, len(NAMES))).eval()
    x = torch.rand(6, 1, 4, 4)
    return net, x, net(x).argmax(1)


def unescaped(text: str) -> str:
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@pytest.mark.parametrize("name", [*NAMES, "# head", "- item", "&amp;", "~~gone~~", "\ud800"])
def test_markdown_shows_what_was_meant(name: str) -> None:
    text = markdown(name)
    assert unescaped(text) == " ".join(re.sub("[\n\ud800]", " ", name).split())
    assert not re.search(r"(?<!\\)(\\\\)*[|<*$`\[&~_]", text) and "\n" not in text
    assert not re.match("[#-]", text)


def test_code_spans() -> None:
    assert code("pyadv evaluate x") == "`pyadv evaluate x`"
    assert code("a `b` ``c``\nd") == "``` a `b` ``c`` d ```"


@pytest.mark.parametrize("name", NAMES)
def test_reports_keep_their_tables(name: str) -> None:
    net, x, y = problem()
    report = evaluate(net, x, y, eps=0.3, attacks={name: PGD(eps=0.3)}, progress=None)
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in table)
    assert f"| {markdown(name)} |" in table[3]
    assert len(str(report).splitlines()) == 4
    document = Document(f"{name} on data", f"pyadv evaluate {name}", {"pgd20": report})
    assert document.to_markdown({}).splitlines()[0] == f"# {markdown(f'{name} on data')}"


def test_pictures_show_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.cbook import is_math_text

    from pyadv.evaluation import plots

    assert not any(is_math_text(in_picture(name)) is True for name in NAMES)
    names = [*NAMES, "$", "$$", r"$\frac{", "\ud800", "\x00"]
    x = torch.rand(len(names), 1, 4, 4)
    y = torch.arange(len(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.worst_examples(x, x.flip(0), y, y.flip(0), names, tmp_path / "examples.png")
        lines = {name: [(0.0, 1.0), (1.0, 0.5)] for name in names}
        plots.accuracy_against({r"$\eps": lines, "b": lines}, tmp_path / "curves.png")
    net, x, y = problem()
    attacks = {r"$\frac{": DeepFool(norm="Linf"), "a|b": DeepFool(norm="Linf")}
    margins = measure_margins(net, x, y, attacks=attacks, progress=None)
    plots.margin_distributions(margins, tmp_path / "margins.png")
    table = [line for line in margins.to_markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    margins.to_csv(tmp_path / "margins.csv")
    assert len((tmp_path / "margins.csv").read_text(encoding="utf-8").splitlines()) == 7


def test_a_picture_that_fails_does_not_take_the_report_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from pyadv.evaluation import plots

    net, x, y = problem()
    report = evaluate(net, x, y, eps=0.3, progress=None)
    document = Document("A net", "", {"pgd20": report}, {"eps": [(0.0, 1.0)]})

    def fail(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(plots, "accuracy_against", fail)
    with pytest.raises(OSError, match="no space"):
        document.write(tmp_path, net, x, y, NAMES)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "PGD-20" in text and "curves.png" not in text
    assert (tmp_path / "report.json").exists() and (tmp_path / "adversarial.npz").exists()


def test_the_words_of_masking_checks_are_shown_as_they_are() -> None:
    net, x, y = problem()
    report = check_masking(net, x, y, eps=0.1, queries=3, progress=None)
    lines = report.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table)
    assert unescaped(lines[0]) == report.summary
