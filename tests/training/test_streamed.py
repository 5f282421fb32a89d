"""A run on streamed images is the run on the same images in memory, also after an interruption."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyadv import training
from pyadv.data import load
from pyadv.training import Config, Display, Interrupted, Trainer, checkpoint

Image = pytest.importorskip("PIL.Image")

QUIET = Display(quiet=True)
NET: dict[str, Any] = {"model": "small-cnn", "epochs": 2, "batch_size": 8, "steps": 1, "val": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image folder: dark and bright images of 10 x 9 to 12 x 9 pixels."""
    path = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    for split, n in (("train", 14), ("test", 4)):
        for low, name in ((0, "dark"), (128, "bright")):
            (path / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(low, low + 128, (9, 10 + i % 3, 3), np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    return path


def config(folder: Path, **settings: Any) -> Config:
    return Config(**{**NET, "data": str(folder), "image_size": 8, "augment": True, **settings})


def test_streamed_interrupted_and_resumed_equals_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.train(config(folder), tmp_path / "whole", device="cpu", display=QUIET)
    original = Trainer._count

    def count(self: Trainer, *args: Any) -> None:
        original(self, *args)
        if (self.epoch, self.step) == (1, 1):
            import signal

            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_count", count)
        with pytest.raises(Interrupted, match="epoch 1 after step 2"):
            streamed = config(folder, stream=True, workers=2)
            training.train(streamed, tmp_path / "cut", device="cpu", display=QUIET)
    torch.manual_seed(99)
    resumed = training.resume(tmp_path / "cut", device="cpu", display=QUIET)
    assert resumed.to_dict() == whole.to_dict()
    a, b = (checkpoint.load(tmp_path / f / "checkpoint.pt")["model"] for f in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert saved["image_size"] == 8 and saved["stream"] is True


class Said(Display):
    """A display that keeps the messages."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_transforms_see_images_at_their_own_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in memory have been cut and resized, so free memory must not decide."""
    module, seen = types.ModuleType("own_transform"), set()

    def crop(x: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(x.shape))
        return x[:, :8, :8]

    module.crop = crop
    monkeypatch.setitem(sys.modules, "own_transform", module)
    settings = {"transform": "own_transform:crop", "workers": 0, "epochs": 1, "method": "standard"}
    made, said = config(folder, augment=None, **settings), Said()
    assert made.resolve(load(folder, image_size=8)).augment is False
    report = training.train(made, tmp_path / "run", device="cpu", display=said)
    assert report.n == 8 and seen == {(3, 9, 10), (3, 9, 11), (3, 9, 12)}
    assert said.lines[0] == (
        f"{folder.name} is streamed by 0 workers: the transform sees images at their own size"
    )
    made.stream = False
    with pytest.raises(ValueError, match=r"stream=False does not go with a transform of"):
        training.train(made, tmp_path / "refused", device="cpu", display=QUIET)
    assert not (tmp_path / "refused").exists()


def test_the_folder_of_a_run_is_said(folder: Path, tmp_path: Path) -> None:
    made, said = config(folder, stream=True, workers=0, epochs=1, method="standard"), Said()
    training.train(made, tmp_path / "run", device="cpu", display=said)
    assert f"{folder.name} is streamed by 0 workers" in said.lines
