"""CIFAR ResNet-18, post- and pre-activation, with the parameter names of the usual checkpoints.

Each has a 3x3 stem without pooling, four stages of two basic blocks (64 to 512 channels) and global
average pooling, so it takes images of 8x8 pixels or more. Both use torch's default initialisation,
as the codes of TRADES, MART, GAIRAT and Rice et al. (2020) do.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """A block of conv-BN-ReLU-conv-BN plus shortcut, then ReLU (He et al. 2015)."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or inp != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """A block of BN-ReLU-conv twice, plus the shortcut of the activated input (He et al. 2016)."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        if stride != 1 or inp != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = self.shortcut(active) if hasattr(self, "shortcut") else x
        out = self.conv1(active)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class _ResNet(nn.Module):
    def __init__(
        self, block: type[BasicBlock | PreActBlock], in_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)

        def stage(inp: int, out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(block(inp, out, stride), block(out, out, 1))

        self.layer1 = stage(64, 64, 1)
        self.layer2 = stage(64, 128, 2)
        self.layer3 = stage(128, 256, 2)
        self.layer4 = stage(256, 512, 2)
        self.linear = nn.Linear(512, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def classify(self, features: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(features, 1).flatten(1))


class ResNet18(_ResNet):
    """A post-activation ResNet-18, with 11.2 million parameters at 10 classes."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__(BasicBlock, in_channels, num_classes)
        self.bn1 = nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(F.relu(self.bn1(self.conv1(x)))))


class PreActResNet18(_ResNet):
    """A pre-activation ResNet-18 with a last BN and ReLU, the network of Rice et al. (2020)."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__(PreActBlock, in_channels, num_classes)
        self.bn = nn.BatchNorm2d(512)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(F.relu(self.bn(self.features(self.conv1(x)))))
