"""Networks for small images that the robustness literature trains."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

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


# name -> function of (in_channels, num_classes, image_size)
MODELS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet-18": lambda channels, classes, size: ResNet18(channels, classes),
    "preact-resnet-18": lambda channels, classes, size: PreActResNet18(channels, classes),
    "wrn-28-10": _wrn(28),
    "wrn-32-10": _wrn(34),  # its name in FAT and GAIRAT, which do not count the shortcuts
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
    """Build the model called `name`, a key of `MODELS`, with fresh weights.

    Only `small-cnn` depends on `image_size` (H, W); the others pool globally.
    Raises ValueError for an unknown name and for sizes that are not positive integers.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    sizes = {"in_channels": (in_channels,), "num_classes": (num_classes,), "image_size": image_size}
    for argument, values in sizes.items():
        if any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in values):
            seen = values if argument == "image_size" else values[0]
            raise ValueError(f"{argument} must be positive and integer, got {seen}")
    return MODELS[name](in_channels, num_classes, image_size)
