"""`pyadv evaluate` on terminals that fail it and files that it cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyadv import __version__, _state
from pyadv.cli import app

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 3)
        self.act = lambda x: x

    def forward(self, x):
        return self.act(self.linear(x.flatten(1)))

net, number = Net(), 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with a model and data."""
    (tmp_path / "own_model.py").write_text(MODULE)
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    y = np.arange(20) % 3
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_model", None)


ARGUMENTS = ["own_model:Net", "--data", "few.npz", "--eps", "0.1", "--n", "6", "--device", "cpu"]


def pyadv(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


FOLDER = Path("evaluation", "own_model.Net-pgd20")


def written(place: Path, folder: Path = FOLDER, n: int = 6, seed: int = 0) -> bool:
    report = json.loads((place / folder / "report.json").read_text())
    files = {file.name for file in (place / folder).iterdir()}
    made = report["provenance"]
    assert made["command"] == report["command"] != ""
    assert (made["pyadv"], made["seed"], made["processes"]) == (__version__, seed, 1)
    assert made["date"].startswith("20") and made["hardware"]["device"] == "cpu"
    pictures = {"curves.png", "examples.png"}
    return report["accuracy"]["pgd20"]["n"] == n and files - pictures == FILES


FILES = {"report.json", "report.md", "adversarial.npz"}


@pytest.mark.parametrize("redirect", ["| true", ">&- 2>&-"], ids=["closed pipe", "closed"])
def test_no_output_loses_no_results(place: Path, redirect: str) -> None:
    command = " ".join([sys.executable, "-m", "pyadv", "evaluate", *ARGUMENTS])
    shell = f"({command}; echo $? > code) {redirect}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300)
    assert written(place) and (place / "code").read_text() == "0\n", done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_console_of_few_characters(place: Path) -> None:
    command = [sys.executable, "-m", "pyadv", "evaluate", *ARGUMENTS]
    few = {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(command, capture_output=True, env=os.environ | few, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (
        written(place) and b"worst case" in done.stdout and b"written to evaluation" in done.stdout
    )
    assert b"expected time: about" in done.stderr
    assert "–" in (place / FOLDER / "report.md").read_text(encoding="utf-8")


def test_states_outlive_a_failure_to_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyadv.evaluation import Document

    def full(*arguments: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Document, "write", full)
        assert "pyadv: the disk is full" in pyadv(*ARGUMENTS, code=1)
    left = {file.name for file in (place / FOLDER).iterdir()}
    assert left == {"pgd20.state", "curves.state", "unfinished.json"}
    pyadv(*ARGUMENTS, "--seed", "1")  # another evaluation, which does not continue this one
    assert written(place, FOLDER.with_name("own_model.Net-pgd20-2"), seed=1)
    pyadv(*ARGUMENTS[:-4], "--n", "7", "--device", "cpu")  # with one more sample
    assert written(place, n=7)


def test_no_report_is_written_over_another(place: Path) -> None:
    pyadv(*ARGUMENTS)
    before = (place / FOLDER / "report.json").read_bytes()
    assert f"written to {FOLDER}-2" in pyadv(*ARGUMENTS)
    assert (place / FOLDER / "report.json").read_bytes() == before
    assert written(place, FOLDER.with_name("own_model.Net-pgd20-2"))
    refused = pyadv(*ARGUMENTS, "--out", FOLDER, code=1)
    assert "--out must be a new folder" in refused and f"but {FOLDER} holds other files" in refused
    pyadv("own_model:Net", "--data", "few.npz", "--eps", "-1", code=1)
    assert len(list((place / "evaluation").iterdir())) == 2  # an error leaves no folder


def test_models_as_objects_and_things_that_are_none(place: Path) -> None:
    pyadv("own_model:net", *ARGUMENTS[1:])
    assert written(place, Path("evaluation", "own_model.net-pgd20"))
    text = pyadv("own_model:number", *ARGUMENTS[1:], code=1)
    assert "model 'own_model:number' must be callable, got a int" in text


NAMED = """
from torch import nn

class Wide(nn.Module):
    def __init__(self, num_classes, image_shape, width=3):
        super().__init__()
        channels, height, _ = image_shape
        self.conv = nn.Conv2d(channels, width, height)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return {"logits": self.head(self.conv(x).flatten(1))}
"""


@pytest.fixture
def tones(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Return the options for a folder of images of two classes, beside a module of networks."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for low, name in ((0, "dark"), (96, "bright")):
            (place / "tones" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(low, low + 160, (9, 10 + i, 3), np.uint8)
                image.fromarray(pixels).save(place / "tones" / split / name / f"{i}.png")
    (place / "named.py").write_text(NAMED)
    yield ["--data", "tones", "--image-size", "8", "--eps", "0.1", "--device", "cpu"]
    sys.modules.pop("named", None)


def clean_accuracy(folder: str) -> float:
    report = json.loads(Path(folder, "report.json").read_text())
    rows = {row["name"]: row for row in report["accuracy"]["pgd20"]["rows"]}
    return rows["clean"]["accuracy"]


def test_a_network_by_name_gets_its_sizes_from_the_data(place: Path, tones: list[object]) -> None:
    from pyadv.models import create

    net = create("named:Wide", num_classes=2, image_size=(8, 8), args={"width": 5})
    inner, accuracy = net.model, {}
    with torch.no_grad():  # the difference of the logits is the mean pixel, in units of std
        inner.conv.weight.fill_(1 / 192)
        inner.conv.bias.zero_()
        inner.head.weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 5))
        inner.head.bias.zero_()
    torch.save(inner.state_dict(), "wide.pt")
    for mean in (0.5, 0.0):  # the threshold; without it every image is bright
        arguments = ["--model-args", "width=5", "--weights", "wide.pt", "--mean", mean]
        pyadv("named:Wide", *arguments, "--std", 0.25, *tones, "--out", f"mean{mean}")
        accuracy[mean] = clean_accuracy(f"mean{mean}")
    assert accuracy == {0.5: 1.0, 0.0: 0.5}


def test_networks_of_timm_and_of_pyadv_by_name(
    place: Path, tones: list[object], timm_stub: dict[str, object]
) -> None:
    from pyadv.models import create

    torch.save(create("timm:resnet50", num_classes=2).state_dict(), "timm.pt")
    pyadv("timm:resnet50", "--weights", "timm.pt", *tones, "--out", "one")
    assert timm_stub == {"name": "resnet50", "in_chans": 3, "num_classes": 2}
    surrogate = ["--surrogate", "timm:resnet50"]
    assert "'timm:resnet50' is untrained" in pyadv(
        "timm:resnet50", "--weights", "timm.pt", *tones, *surrogate, code=1
    )
    pyadv("timm:resnet50", "--model-args", "pretrained=true", *tones, "--out", "two")
    assert timm_stub["pretrained"] is True
    torch.save(create("small-cnn", num_classes=2, image_size=(8, 8)).state_dict(), "small.pt")
    pyadv("small-cnn", "--weights", "small.pt", *tones, "--n", "4")
    assert written(place, Path("evaluation", "small-cnn-pgd20"), n=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small-cnn"], "model 'small-cnn' is untrained: give a file of weights"),
        (["timm:resnet50"], "is untrained: give a file of weights, or model_args pretrained=true"),
        (["resnet18"], "no checkpoint at resnet18; did you mean 'resnet-18'?"),
        (["timm:resnet5", "--weights", "other.pt"], "timm has no 'resnet5'"),
        (["named:Wide", "--weights", "absent.pt"], "weights: no file at absent.pt"),
        (["named:Wide", "--weights", "other.pt"], "head.bias has shape (7,), not (2,)"),
        (["named:Wide", "--model-args", "depth=2"], "model 'named:Wide' does not take (num_c"),
        (["named:Wide", "--model-args", "depth"], "model_args: 'depth' is not name=value"),
        (["named:Wide", "--mean", "0.5"], "mean and std must be given together"),
        (["named:Wide", "--mean", "0.5,0.5", "--std", "1"], "one per channel (3), got 2 numbers"),
        (["own_model:net"], "model 'own_model:net' does not take images (3, 8, 8)"),
        (["named:Wide", "--image-size", "0"], "--image-size must be >= 1, got 0"),
        (["robustbench:x", "--model-args", "a=1"], "--model-args: for a network by name, but rob"),
    ],
)
def test_mistakes_about_networks_by_name(
    place: Path, tones: list[object], timm_stub: dict, arguments: list[str], message: str
) -> None:
    from pyadv.models import create

    if "other.pt" in arguments:
        other = create("named:Wide", num_classes=7, image_size=(8, 8))
        torch.save(other.state_dict(), "other.pt")
    output = pyadv(arguments[0], *tones, *arguments[1:], code=1)
    assert message in output and output.count("\n") == 1
    assert not Path("evaluation").exists()


def test_options_that_a_run_does_not_take(place: Path) -> None:
    from pyadv.models import create

    architecture = {"name": "small-cnn", "in_channels": 1, "num_classes": 3, "image_size": (8, 8)}
    whole = checkpoint(architecture=architecture, model=create(**architecture).state_dict())
    _state.save(place / "whole.pt", whole, "checkpoint", 1)
    output = pyadv("whole.pt", "--image-size", "8", code=1)
    assert "--image-size needs --data: the run's images have their own size" in output
    output = pyadv("whole.pt", "--weights", "x.pt", "--mean", "0", code=1)
    assert "--weights, --mean: for a network by name, but whole.pt has its own" in output


def checkpoint(**changes: object) -> dict:
    from pyadv.models import create
    from pyadv.training import Config

    architecture = {"name": "small-cnn", "in_channels": 1, "num_classes": 3, "image_size": (8, 8)}
    config = Config.from_dict({"data": "few.npz", "eps": 0.1})
    state = {"architecture": architecture, "config": vars(config)}
    state["model"] = create(**{**architecture, "image_size": (28, 28)}).state_dict()
    return {**state, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is no complete checkpoint of a run: Error\\(s\\) in loading state_dict"),
        ({"model": {}}, "is no complete checkpoint of a run"),
        ({"architecture": None}, "is no complete checkpoint of a run"),
        (
            {"architecture": {"name": "small-cnn", "num_classes": -1}},
            "num_classes must be positive and integer, got -1",
        ),
        ({"architecture": {"name": "small-cnn", "depth": 3}}, "unexpected keyword argument 'dep"),
    ],
    ids=["other shapes", "no weights", "no architecture", "num_classes", "unknown"],
)
def test_checkpoints_that_do_not_fit_together(place: Path, changes: dict, message: str) -> None:
    import re

    _state.save(place / "run.pt", checkpoint(**changes), "checkpoint", 1)
    output = pyadv("run.pt", "--device", "cpu", code=1)
    assert re.search(message, output) and output.startswith(
        "pyadv: run.pt" if "run" in message else ""
    )


def test_files_that_are_no_checkpoints(place: Path) -> None:
    _state.save(place / "whole.pt", checkpoint(), "checkpoint", 1)
    data = (place / "whole.pt").read_bytes()
    (place / "part.pt").write_bytes(data[: len(data) // 2])
    (place / "empty.pt").write_bytes(b"")
    _state.save(place / "other.pt", {"model": {}}, "evaluation", 2)
    _state.save(place / "lacks.pt", {"model": {}}, "checkpoint", 1)
    torch.save([1, 2], place / "list.pt")
    for name, message in (
        ("part.pt", "part.pt cannot be read as a saved checkpoint"),
        ("empty.pt", "empty.pt cannot be read as a saved checkpoint"),
        ("other.pt", "other.pt is not a pyadv checkpoint"),
        ("lacks.pt", "lacks.pt is no complete checkpoint of a run: it lacks 'config'"),
        ("list.pt", "list.pt is not a pyadv checkpoint"),
        ("few.npz", "few.npz cannot be read as a saved checkpoint"),
        ("~nouser/run.pt", "no checkpoint at ~nouser/run.pt"),
    ):
        assert f"pyadv: {message}" in pyadv(name, code=1)


def test_paths_that_lead_nowhere(place: Path) -> None:
    assert "pyadv: " in pyadv("own_model:Net", "--data", "~nouser/x.npz", "--eps", "0.1", code=1)
    (place / "file").write_text("")
    assert "--out must be a folder, but file is a file" in pyadv(
        *ARGUMENTS, "--out", "file", code=1
    )


def test_a_state_that_is_damaged(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyadv.evaluation import document

    claim = document.claim

    def damage(folder: Path, settings: dict) -> bool:
        free = claim(folder, settings)
        (folder / "pgd20.state").write_bytes(b"no state")
        return free

    monkeypatch.setattr(document, "claim", damage)
    assert "pgd20.state cannot be read as a saved evaluation" in pyadv(*ARGUMENTS, code=1)


def test_a_stderr_that_is_closed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyadv.attacks.progress import Lines, to_stderr

    for stream in (None, open(os.devnull, "w")):  # noqa: SIM115
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        Lines(place / "log.txt")("pgd", 3, 3, 2)
        to_stderr("a line")
    assert len((place / "log.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(place: Path) -> None:
    arguments = [*ARGUMENTS[:-4], "--device", "cpu"]
    pyadv(*arguments, "--out", "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "pyadv", "evaluate", *arguments, "--out", "two"]
    paths = os.pathsep.join((str(Path(_state.__file__).parents[1]), str(place)))
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("worst case") == 1 and done.stdout.count("written to two") == 1
    one, two = (json.loads(Path(f, "report.json").read_text()) for f in ("one", "two"))
    assert one["accuracy"] == two["accuracy"] and one["curves"] == two["curves"]
    assert [r["provenance"]["processes"] for r in (one, two)] == [1, 2]
    assert {file.name for file in Path("two").iterdir()} == {
        file.name for file in Path("one").iterdir()
    }
