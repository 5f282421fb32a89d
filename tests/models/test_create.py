"""Own networks and those of timm are built by name, with arguments, weights and statistics."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyadv import models

OWN = """
from typing import NamedTuple
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int, image_shape: tuple, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)).relu())

def unannotated(in_channels, num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))

def annotated(num_classes: int, in_channels: int = 3) -> nn.Module:
    return unannotated(in_channels, num_classes)

class Inner:
    make = Net

class Output(NamedTuple):
    hidden: torch.Tensor
    logits: torch.Tensor

class Wrapped(Net):
    def forward(self, x):
        return Output(x, super().forward(x))

class Normed(Net):
    def __init__(self, num_classes: int, image_shape: tuple):
        super().__init__(num_classes, image_shape)
        self.norm = nn.BatchNorm2d(image_shape[0])
        self.norm.eval()
    def forward(self, x):
        return super().forward(self.norm(x))

number = 3
no_network = dict
ready = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
ten = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Return a function that builds a network of a module in the current folder."""
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def make(name: str, **settings: Any) -> nn.Module:
        given = {"in_channels": 3, "num_classes": 5, "image_size": (2, 2), **settings}
        return models.create(f"own_nets:{name}", **given)

    yield make
    sys.modules.pop("own_nets", None)


X = torch.rand(3, 3, 2, 2)


@pytest.mark.parametrize("name", ["Net", "unannotated", "annotated", "Inner.make", "ready"])
def test_own_networks_get_what_they_name(own: Callable[..., nn.Module], name: str) -> None:
    assert own(name)(X).shape == (3, 5)
    assert "" not in sys.path[:1]  # the current folder is searched for the import alone


def test_a_network_that_is_named_is_copied(own: Callable[..., nn.Module]) -> None:
    first, second = own("ready"), own("ready")
    assert torch.equal(first[1].weight, second[1].weight)
    with torch.no_grad():
        first[1].weight.zero_()
    assert second[1].weight.any() and own("ready")[1].weight.any()


def test_arguments_come_first(own: Callable[..., nn.Module]) -> None:
    model = own("Net", args={"width": 7, "num_classes": 6})
    assert model.body.out_features == 7
    assert model(X).shape == (3, 6)


def test_networks_that_return_more_than_logits(own: Callable[..., nn.Module]) -> None:
    model = own("Wrapped")
    assert isinstance(model, models.Logits)
    torch.testing.assert_close(model(X), model.model(X).logits)


def test_the_trial_changes_nothing(own: Callable[..., nn.Module]) -> None:
    own("ready")  # imports the module, which draws weights
    state = torch.get_rng_state()
    model = own("ready")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    normed = own("Normed")
    assert normed.training and not normed.norm.training
    assert normed.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Absent", {}, "model 'own_nets:Absent': own_nets has no 'Absent'"),
        ("number", {}, "must be callable, got a int"),
        ("no_network", {}, "must return a torch.nn.Module, got a dict"),
        ("Net", {"args": {"depth": 3}}, r"does not take \(.*depth=3\): .*'depth'"),
        ("ready", {"args": {"depth": 3}}, "takes no model_args"),
        ("ten", {}, r"returns logits of shape \(1, 2\) for one image; the data has 5 classes"),
        ("ready", {"image_size": (3, 3)}, r"does not take images \(3, 3, 3\)"),
        ("Net", {"mean": 0.5}, "mean and std must be given together"),
        ("Net", {"mean": (0.5, 0.5), "std": 1.0}, r"one per channel \(3\), got 2"),
        ("Net", {"weights": "absent.pt"}, "no file at absent.pt"),
    ],
)
def test_what_is_refused(
    own: Callable[..., nn.Module], name: str, settings: dict, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        own(name, **settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smallcnn", "did you mean 'small-cnn'"),
        ("no_such_module:Net", "there is no module 'no_such_module'"),
        ("own nets:Net", "must have the form package.module:name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.create(name)


def test_an_error_in_the_users_module_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        models.create("own_broken:Net")


def test_statistics_are_inside(own: Callable[..., nn.Module]) -> None:
    model = own("ready", mean=(0.1, 0.2, 0.3), std=(0.5,))
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(X), model.model((X - mean) / 0.5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"kind": "checkpoint", "format": 1, "model": state},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"net": {f"module._orig_mod.model.{k}": v for k, v in state.items()}},
        lambda state: {f"model.{k}": v for k, v in state.items()} | {"mean": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("statistics", [{}, {"mean": 0.5, "std": 0.5}])
def test_weights_from_a_file(
    own: Callable[..., nn.Module], wrap: Callable[[dict], dict], statistics: dict
) -> None:
    saved = own("Net")
    torch.save(wrap(saved.state_dict()), "weights.pt")
    model = own("Net", weights="weights.pt", **statistics)
    x = (X - 0.5) / 0.5 if statistics else X
    assert torch.equal(model(X), saved(x))


def test_statistics_in_a_file_are_not_dropped_in_silence(own: Callable[..., nn.Module]) -> None:
    saved = own("Net", mean=0.5, std=0.25)
    torch.save(saved.state_dict(), "weights.pt")
    with pytest.warns(UserWarning, match="mean and std in it are left out: give mean and std"):
        own("Net", weights="weights.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own("Net", weights="weights.pt", mean=0.5, std=0.25)(X), saved(X))
        models.load_weights(saved, "weights.pt")


def test_weights_from_safetensors(own: Callable[..., nn.Module]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved = own("Net")
    safetensors.save_file(saved.state_dict(), "weights.safetensors")
    assert torch.equal(own("Net", weights="weights.safetensors")(X), saved(X))


def test_a_classifier_of_other_classes_stays_fresh(own: Callable[..., nn.Module]) -> None:
    saved = own("Net", num_classes=9)
    torch.save(saved.state_dict(), "weights.pt")
    with pytest.warns(UserWarning, match=r"head.weight, head.bias keep their fresh values"):
        model = own("Net", weights="weights.pt")
    assert torch.equal(model.body.weight, saved.body.weight)
    assert model(X).shape == (3, 5)


class Evil:
    def __reduce__(self):
        return Path.mkdir, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"body.weight": torch.zeros(4, 12)}, "it lacks body.bias, head.weight, head.bias"),
        ({"other": torch.zeros(1)}, "the network has no other"),
        ({"body.weight": torch.zeros(4, 11)}, r"body.weight has shape \(4, 11\), not \(4, 12\)"),
        ([1, 2], "holds no state dict"),
        ({"evil": Evil()}, "cannot be read as tensors alone"),
    ],
)
def test_weights_that_do_not_fit(own: Callable[..., nn.Module], content: Any, message: str) -> None:
    torch.save(content, "weights.pt")
    with pytest.raises(ValueError, match=message):
        own("Net", weights="weights.pt")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["Net", "annotated", "Inner.make", "ready"])
def test_what_a_checkpoint_may_name(own: Callable[..., nn.Module], name: str) -> None:
    models.check_restorable(f"own_nets:{name}")


@pytest.mark.parametrize(
    "name",
    ["own_nets:unannotated", "own_nets:number", "os:system", "subprocess:Popen", "torch.hub:load"],
)
def test_what_a_checkpoint_may_not_name(own: Callable[..., nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=r"must be a class derived from torch.nn.Module"):
        models.check_restorable(name)


def test_timm_networks_get_the_data_s_sizes(timm_stub: dict[str, Any]) -> None:
    sizes = {"in_channels": 1, "num_classes": 7, "image_size": (8, 8)}
    assert models.create("timm:resnet50", **sizes)(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    assert timm_stub == {"name": "resnet50", "in_chans": 1, "num_classes": 7}
    models.create("timm:vit_tiny.augreg", args={"drop_rate": 0.1}, **sizes)
    assert timm_stub["img_size"] == (8, 8) and timm_stub["drop_rate"] == 0.1
    with pytest.raises(ValueError, match="timm has no 'resnet5'; did you mean 'resnet50'"):
        models.create("timm:resnet5")


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        models.create("timm:resnet50")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_networks_of_timm(name: str) -> None:
    pytest.importorskip("timm")
    model = models.create(f"timm:{name}", num_classes=4, image_size=(32, 32))

    def logits(x: Tensor) -> Tensor:
        return model.eval()(x)

    assert logits(torch.rand(2, 3, 32, 32)).shape == (2, 4)
