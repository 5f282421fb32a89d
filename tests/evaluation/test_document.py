"""The folder of an evaluation: its contents, and continuing after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyadv import evaluation
from pyadv.evaluation import document as document_module
from pyadv.evaluation import run_suite


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    x = torch.rand(30, 1, 8, 8)
    return net, x, net(x).argmax(1)


SETTINGS = {"eps": 0.05, "batch_size": 16, "progress": None}


def test_everything_is_written(problem, tmp_path: Path) -> None:
    net, x, y = problem
    x, y = x[:6], y[:6]
    document = run_suite("all", net, x, y, title="A net", command="pyadv evaluate", **SETTINGS)
    missing = document.write(tmp_path / "out", net, x, y, ["a", "b", "c", "d"])
    assert missing == []
    names = {file.name for file in (tmp_path / "out").iterdir()}
    pictures = {"curves.png", "examples.png", "margins.png"}
    assert names == pictures | {"report.json", "report.md", "adversarial.npz", "margins.csv"}
    read = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(read["accuracy"]) == {"pgd20", "autoattack"}
    assert read["masking"]["checks"] and read["margins"] and read["title"] == "A net"
    radii, steps = (dict(map(tuple, read["curves"][k])) for k in ("eps", "steps"))
    assert radii[0.0] == 1 and list(radii) == sorted(radii) and radii[0.05] == steps[20.0]
    assert list(radii.values()) == sorted(radii.values(), reverse=True)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# A net") and "## Is it really robust?" in text
    assert all(f"({name})" in text for name in pictures)
    saved = np.load(tmp_path / "out" / "adversarial.npz")
    x_adv, index = torch.from_numpy(saved["x_adv"]), torch.from_numpy(saved["index"])
    assert len(index) and (x_adv - x[index]).abs().max() <= 0.05 + 1e-6
    predicted = net(x_adv).argmax(1)
    assert (predicted != y[index]).all() and predicted.tolist() == saved["prediction"].tolist()
    assert set(saved["attack"]) <= {"apgd-ce", "apgd-t", "fab-t", "square"}


def test_what_a_kill_leaves_of_the_states_can_be_claimed(tmp_path: Path, monkeypatch) -> None:
    folder, settings = tmp_path / "report", {"suite": "all"}
    assert document_module.claim(folder, settings)
    states = (folder / "a.state", folder / "b.state")
    for file in states:
        file.touch()

    def killed(state: Path) -> list[Path]:
        if state == states[1]:
            raise KeyboardInterrupt
        return [state]

    document = document_module.Document("", "", {}, {}, states=states)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(document_module, "state_files", killed)
        document.remove_states()
    assert not states[0].exists() and document_module.claim(folder, settings)
    document.remove_states()
    assert not list(folder.iterdir())


def test_an_interrupted_suite_goes_on(problem, tmp_path: Path) -> None:
    net, x, y = problem
    whole = run_suite("pgdplus", net, x, y, **SETTINGS)
    calls = []

    def interrupt(*now) -> None:
        calls.append(now)
        if now[0] == "5 steps":
            raise KeyboardInterrupt

    settings = {**SETTINGS, "state": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run_suite("pgdplus", net, x, y, **{**settings, "progress": interrupt})
    assert {f.name for f in tmp_path.iterdir()} == {"pgdplus.state", "curves.state"}
    again = []
    settings["progress"] = lambda *now: again.append(now[0])
    document = run_suite("pgdplus", net, x, y, **settings)
    assert "PGD+" not in again and "2 steps" not in again and "50 steps" in again
    assert document.to_dict() == {**whole.to_dict()}
    assert len(list(tmp_path.iterdir())) == 2  # the state stays until the results are saved
    document.remove_states()
    document.remove_states()  # another process has been faster
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="suite must be one of pgd20, .*got 'aa'"):
        run_suite("aa", net, x, y, **SETTINGS)


def test_nothing_broken_and_no_pictures(problem, tmp_path: Path, monkeypatch) -> None:
    net, x, y = problem
    document = run_suite("pgd20", net, x[:5], y[:5], **{**SETTINGS, "eps": 1e-6})
    monkeypatch.delattr(evaluation, "plots", raising=False)
    # stands for a machine without matplotlib
    monkeypatch.setitem(sys.modules, "pyadv.evaluation.plots", None)
    missing = document.write(tmp_path, net, x[:5], y[:5], ["a", "b", "c", "d"])
    assert len(missing) == 1 and "matplotlib" in missing[0]
    assert np.load(tmp_path / "adversarial.npz")["x_adv"].shape == (0, 1, 8, 8)
    assert "png" not in (tmp_path / "report.md").read_text()
