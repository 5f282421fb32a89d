"""The networks the robustness literature trains, for small images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pyadv.models.normalized import Normalized
from pyadv.models.resnet import PreActResNet18, ResNet18
from pyadv.models.small_cnn import SmallCNN
from pyadv.models.wide_resnet import WideResNet

__all__ = [
    "MODELS",
    "Normalized",
    "PreActResNet18",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "create",
]


def _wrn(depth: int, **variant) -> Callable[..., nn.Module]:
    return lambda channels, classes, size: WideResNet(depth, 10, channels, classes, **variant)


# name -> build(in_channels, num_classes, image_size)
MODELS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet-18": lambda channels, classes, size: ResNet18(channels, classes),
    "preact-resnet-18": lambda channels, classes, size: PreActResNet18(channels, classes),
    "wrn-28-10": _wrn(28),
    "wrn-32-10": _wrn(34),  # FAT's and GAIRAT's name: their count leaves the shortcuts out
    "wrn-34-10": _wrn(34),
    "wrn-34-10-madry": _wrn(34, slope=0.1, shortcut="pad"),
}


def create(
    name: str,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
) -> nn.Module:
    """Build the model called `name` (a key of `MODELS`) with fresh weights.

    Only `small-cnn` depends on `image_size` (H, W); the others pool globally.
    Raises ValueError for an unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](in_channels, num_classes, image_size)
