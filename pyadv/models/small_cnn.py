"""A small network for fast experiments."""

from __future__ import annotations

from torch import nn


class SmallCNN(nn.Sequential):
    """A network of two strided convolutions and two linear layers, without batch statistics.

    It is the MNIST network of Wong and Kolter (2018) and Fast AT (Wong et al. 2020): 166,406
    parameters at 1x28x28. `image_size` (H, W) determines the first linear layer.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (28, 28)
    ) -> None:
        height, width = (side // 4 for side in image_size)
        if not (height and width):
            raise ValueError(f"image_size must be at least (4, 4) for SmallCNN, got {image_size}")
        super().__init__(
            nn.Conv2d(in_channels, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * height * width, 100),
            nn.ReLU(),
            nn.Linear(100, num_classes),
        )
