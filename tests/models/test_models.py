"""Networks have the published parameter counts, names, shapes and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyadv import models
from pyadv.models import Normalized, PreActResNet18, SmallCNN, WideResNet

# Parameter counts of the published networks at 3 channels and 10 classes.
PARAMETERS = {
    "resnet-18": 11_173_962,
    "preact-resnet-18": 11_172_170,
    "wrn-28-10": 36_479_194,
    "wrn-32-10": 46_160_474,
    "wrn-34-10": 46_160_474,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_small_cnn_count() -> None:
    assert sum(p.numel() for p in SmallCNN().parameters()) == 166_406


@pytest.mark.parametrize("name", [n for n in models.MODELS if not n.startswith("wrn")])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 21, 18)])
def test_any_small_image_fits(name: str, shape: tuple[int, int, int]) -> None:
    model = models.create(name, in_channels=shape[0], num_classes=7, image_size=shape[1:])
    assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("variant", [{}, {"slope": 0.1, "shortcut": "pad"}])
def test_wide_resnet_variants(variant: dict) -> None:
    model = WideResNet(10, 2, in_channels=1, num_classes=5, **variant)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 5)
    shortcuts = [m for n, m in model.named_modules() if n.endswith("convShortcut")]
    assert len(shortcuts) == 3  # 16 -> 32 -> 64 -> 128: each stage widens once
    assert all(isinstance(m, nn.Conv2d) for m in shortcuts) == (not variant)


def test_padded_shortcut_keeps_the_input_in_the_middle() -> None:
    """The shortcut keeps the input in the middle channels. A block whose second convolution is zero
    returns its shortcut."""
    block = WideResNet(10, 1, shortcut="pad").block2.layer[0].eval()
    nn.init.zeros_(block.conv2.weight)
    # positive values, which the activation before the shortcut does not change
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    scale = 1 / math.sqrt(1 + block.bn1.eps)
    assert out.shape == (1, 32, 2, 2)
    assert not out[:, :8].any() and not out[:, 24:].any()
    torch.testing.assert_close(out[:, 8:24], nn.functional.avg_pool2d(x, 2) * scale)


def test_wide_resnet_initialisation() -> None:
    torch.manual_seed(0)
    model = WideResNet(16, 4)
    weight = model.block3.layer[1].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert not model.fc.bias.any()


def test_published_names_load() -> None:
    """The keys of TRADES's checkpoints load, with their unused sub_block1, wrapped or not."""
    model = WideResNet(10, 1)
    state = model.state_dict()
    for key in ("block1.layer.0.bn1.weight", "block2.layer.0.convShortcut.weight", "bn1.bias"):
        assert key in state
    old = {**state, "sub_block1.layer.0.bn1.weight": torch.ones(16)}
    WideResNet(10, 1).load_state_dict(old)
    wrapped = {f"model.{key}": value for key, value in old.items()}
    wrapped |= {"mean": torch.zeros(1, 1, 1, 1), "std": torch.ones(1, 1, 1, 1)}
    Normalized(WideResNet(10, 1), 0.0, 1.0).load_state_dict(wrapped)
    assert "layer4.1.bn2.weight" in PreActResNet18().state_dict()


@pytest.mark.parametrize("depth", [33, 4, 32])
def test_depth_rule(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6 n \\+ 4 with n >= 1, got {depth}"):
        WideResNet(depth)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="shortcut must be"):
        WideResNet(10, 1, shortcut="none")
    for argument, value in (("num_classes", -1), ("in_channels", 0), ("num_classes", 2.5)):
        with pytest.raises(
            ValueError, match=f"{argument} must be positive and integer, got {value}"
        ):
            models.create("small-cnn", **{argument: value})
    with pytest.raises(ValueError, match="image_size must be positive and integer"):
        models.create("small-cnn", image_size=(0, 28))
    with pytest.raises(ValueError, match="model must be one of small-cnn, .*got 'resnet18'"):
        models.create("resnet18")
    with pytest.raises(ValueError, match=r"at least \(4, 4\)"):
        SmallCNN(image_size=(3, 28))


def test_normalized_is_the_model_on_normalised_pixels() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = Normalized(nn.Flatten(), mean, std)
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), expected.flatten(1))
    assert model.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(Normalized(nn.Flatten(), 0.5, 2)(x), (x.flatten(1) - 0.5) / 2)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.0, 0.0, "std must be finite and positive"),
        (0.0, (1.0, -1.0), "std must be finite and positive"),
        (float("nan"), 1.0, "mean must be finite"),
    ],
)
def test_normalized_refuses(mean: float, std: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalized(nn.Flatten(), mean, std)
