"""Runs with a network of one's own, with arguments, first weights and statistics of the pixels."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyadv import models, training
from pyadv.data import ImageData
from pyadv.training import Config, Display, build, checkpoint, load_model
from pyadv.training.config import arguments

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes: int, image_size: tuple, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(1, width, 4, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * (image_size[0] // 4) * (image_size[1] // 4), num_classes),
        )

def unannotated(num_classes):
    return Net(num_classes, (28, 28))
"""
FAST: dict[str, Any] = {"epochs": 1, "batch_size": 50, "steps": 1, "eps": 0.1}
QUIET = Display(quiet=True)


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mynet", None)


def train(data: ImageData, folder: str, **settings: Any) -> None:
    config = Config.from_dict({**FAST, **settings})
    training.train(config, folder, data=data, device="cpu", display=QUIET)


def test_a_run_remembers_its_network(small: ImageData) -> None:
    train(small, "run", model="mynet:Net", model_args="width=5", mean=[0.3], std=[0.35])
    saved = json.loads(Path("run/config.json").read_text())
    assert saved["model_args"] == {"width": 5} and saved["mean"] == [0.3] and saved["std"] == [0.35]
    run = load_model("run")
    assert isinstance(run.model, models.Normalized)
    assert run.model.model[0].out_channels == 5
    assert run.config.model_args == {"width": 5}
    training.resume("run", data=small, device="cpu", display=QUIET)


def test_training_starts_from_weights_and_resumes_without_them(small: ImageData) -> None:
    settings = {"model": "mynet:Net", "mean": (0.3,), "std": (0.35,)}
    torch.manual_seed(5)
    first = models.create("mynet:Net", in_channels=1, image_size=(28, 28))
    torch.save(first.state_dict(), "first.pt")
    train(small, "run", **settings, weights="first.pt", method="standard", lr=1e-30)
    trained = load_model("run").model.model
    for name, value in first.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value)
    Path("first.pt").unlink()
    training.resume("run", data=small, device="cpu", display=QUIET)


def test_a_function_that_a_checkpoint_must_not_call_is_refused_before_work(
    small: ImageData,
) -> None:
    with pytest.raises(ValueError, match="a function annotated to return one"):
        train(small, "run", model="mynet:unannotated")
    assert not Path("run").exists()


def test_a_checkpoint_cannot_call_functions(small: ImageData) -> None:
    train(small, "run", model="mynet:Net")
    state = checkpoint.load(Path("run/checkpoint.pt"))
    state["architecture"] |= {"name": "os:mkdir", "args": {"path": "ran"}}
    checkpoint.save(Path("evil.pt"), state)
    with pytest.raises(ValueError, match="loading a checkpoint must not call anything else"):
        load_model("evil.pt")
    assert not Path("ran").exists()


def test_arguments_of_first_weights_are_not_kept(small: ImageData) -> None:
    config = Config(model="timm:resnet18", model_args={"pretrained": True, "drop_rate": 0.1})
    assert build.architecture(config, small)["args"] == {"drop_rate": 0.1}
    config.model = "mynet:Net"  # what an own network calls pretrained may change its form
    assert build.architecture(config, small)["args"] == {"pretrained": True, "drop_rate": 0.1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("depth=10", {"depth": 10}),
        (
            "depth=10,act=gelu, pre=true,x=None",
            {"depth": 10, "act": "gelu", "pre": True, "x": None},
        ),
        ("sizes=[1,2],name=a", {"sizes": [1, 2], "name": "a"}),
        ("sizes=(1,2),f=0.5", {"sizes": [1, 2], "f": 0.5}),
        ('{"depth": {"a": 1}}', {"depth": {"a": 1}}),
        ({"depth": 3}, {"depth": 3}),
        ("", {}),
    ],
)
def test_arguments(text: Any, value: dict) -> None:
    assert arguments(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth", "'depth' is not name=value"),
        ("=3", "'' is not name=value"),
        ("{depth: 3}", "is not JSON"),
        ([1], "is not a dict"),
        ({"f": torch.nn.ReLU}, "cannot be written as JSON"),
    ],
)
def test_arguments_that_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict({"model_args": text})


def test_statistics_go_together(small: ImageData) -> None:
    with pytest.raises(ValueError, match="mean and std must go together"):
        Config(mean=(0.5,)).resolve(small)


class Attention(torch.nn.Module):
    """One fused attention over the rows of an image of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = torch.nn.Linear(28, 48), torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(attended.mean((1, 2)))


def test_emr_takes_the_form_that_the_network_allows(
    small: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pyadv")
    assert build.emr_derivative(models.SmallCNN(), small) == "tangent"
    assert build.emr_derivative(Attention(), small) == "difference"
    lines: list[str] = []

    class Said(Display):
        def message(self, text: str) -> None:
            lines.append(text)

    parts = {"data": small, "device": "cpu", "display": Said(quiet=True)}
    training.train(Config(**FAST, emr=0.02), tmp_path / "run", model=Attention(), **parts)
    assert any(line.startswith("EMR by finite differences") for line in lines)
    tries = [record.message for record in caplog.records if "second derivative" in record.message]
    assert len(tries) == 2 and "attention" in tries[1]  # one here, one of the run


def test_a_lack_of_memory_does_not_choose_the_form_of_emr(
    small: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = torch.autograd.grad

    def full(*args: Any, **settings: Any) -> Any:
        if "create_graph" in settings:
            return once(*args, **settings)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        build.emr_derivative(models.SmallCNN(), small)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_vision_transformers_of_other_libraries(
    small: ImageData, tmp_path: Path, library: str
) -> None:
    module = pytest.importorskip(library)
    if library == "timm":
        sizes = {"patch_size": 7, "embed_dim": 24, "depth": 1, "num_heads": 2}
        shape = {"in_channels": 1, "num_classes": 10, "image_size": (28, 28)}
        net = models.create("timm:vit_tiny_patch16_224", args=sizes, **shape)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 24, "image_size": 28, "patch_size": 7, "num_channels": 1}
        net = module.ViTForImageClassification(module.ViTConfig(num_labels=10, **sizes))
    parts = {"data": small, "device": "cpu", "display": QUIET}
    report = training.train(Config(**FAST, emr=0.02), tmp_path / "run", model=net, **parts)
    assert report is not None and report.n == 40


RESNET50 = """
import json, sys, torch
from pyadv import training
from pyadv.data import load

def peak():  # MB; ru_maxrss would count the process that started this one
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

torch.set_num_threads(1)
before = peak()
data = load(sys.argv[1], image_size=224, workers=0, whole_images=True)
settings = {"method": "at", "steps": 1, "eps": 4 / 255, "epochs": 1, "batch_size": 4}
settings |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
config = training.Config(model="timm:resnet50", transform="resized-crop", **settings)
trainer = training.Trainer(config, data, device="cpu", display=training.Display(quiet=True))
trainer.fit()
print(json.dumps({"before": before, "peak": peak(), "loss": trainer.records[0]["loss"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_resnet50_of_timm_trains_at_224_in_bounded_memory(tmp_path: Path) -> None:
    """One step of adversarial training on a batch of 4 peaked at 1.5 GB."""
    pytest.importorskip("timm")
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, n in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (300, 260, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.jpg")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RESNET50, str(tmp_path / "photos")],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert math.isfinite(found["loss"]) and found["peak"] < 2000
