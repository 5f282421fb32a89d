"""A trained run, saved and loaded in the way of the Hugging Face Hub, in local folders."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from pyadv import models, training  # noqa: E402
from pyadv.integrations.hub import PretrainedRun  # noqa: E402
from pyadv.training.checkpoint import Trained  # noqa: E402


@pytest.fixture
def trained():
    torch.manual_seed(0)
    architecture = {
        **{"name": "small-cnn", "in_channels": 1, "num_classes": 10},
        "image_size": (28, 28),
    }
    config = training.Config.from_dict({"method": "trades", "eps": 0.1, "beta": 4.0})
    return Trained(models.create(**architecture).eval(), config, architecture)


def test_save_and_load(trained, tmp_path):
    x = torch.rand(2, 1, 28, 28)
    run = PretrainedRun(trained)
    run.save_pretrained(tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "config.json"} <= names
    assert not any(name.endswith((".pt", ".bin", ".pkl")) for name in names)
    again = PretrainedRun.from_pretrained(tmp_path / "run")
    assert not again.training and torch.equal(again(x), trained.model(x))
    assert again.config == trained.config and again.architecture == trained.architecture
    with pytest.raises(FileNotFoundError, match="no saved run of pyadv"):
        (tmp_path / "empty").mkdir()
        PretrainedRun.from_pretrained(tmp_path / "empty")


def test_from_a_run(tmp_path):
    from pyadv.data import load

    folder = tmp_path / "run"
    data = load()
    few = data.__class__(
        **{**vars(data), "train_x": data.train_x[:64], "train_y": data.train_y[:64]}
        | {"test_x": data.test_x[:16], "test_y": data.test_y[:16]}
    )
    config = training.Config.from_dict({"epochs": 1, "steps": 1, "batch_size": 32})
    training.train(config, folder, data=few, device="cpu")
    run = PretrainedRun.from_run(folder)
    run.save_pretrained(tmp_path / "saved")
    again = PretrainedRun.from_pretrained(tmp_path / "saved")
    x = few.test_x[:4]
    assert torch.equal(again(x), training.load_model(folder).model(x))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["config"]["epochs"] == 1


def test_push(trained, tmp_path, monkeypatch):
    """What would be uploaded is what `save_pretrained` writes."""
    pushed = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **settings):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **settings):
            from pathlib import Path

            pushed[repo_id] = {p.name for p in Path(folder_path).iterdir()}
            return "done"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert PretrainedRun(trained).push_to_hub("me/run") == "done"
    assert {"model.safetensors", "config.json", "README.md"} <= pushed["me/run"]


def test_from_the_hub(trained, tmp_path, monkeypatch):
    """Files come by hf_hub_download when the name is no folder."""
    PretrainedRun(trained).save_pretrained(tmp_path / "there")
    asked = []

    def download(repo_id, filename, revision=None, **settings):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / "there" / filename)

    monkeypatch.setattr("pyadv.integrations.hub.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    again = PretrainedRun.from_pretrained("me/run", revision="v1")
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(x), trained.model(x))
    assert {("me/run", "config.json", "v1"), ("me/run", "model.safetensors", "v1")} <= set(asked)
