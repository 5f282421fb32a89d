"""Wide ResNets (Zagoruyko and Komodakis 2016) in the variants of the robustness literature."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["conv", "pad"]
SHORTCUTS: tuple[Shortcut, ...] = get_args(Shortcut)


class _PoolPad(nn.Module):
    """A shortcut without parameters: average pooling, then zero channels on both sides."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.side = stride, (out - inp) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, self.side, self.side))


class _Block(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, slope: float, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.slope = slope
        self.convShortcut: nn.Module | None = None
        if inp != out and shortcut == "conv":
            self.convShortcut = nn.Conv2d(inp, out, 1, stride, bias=False)
        elif inp != out:
            self.convShortcut = _PoolPad(inp, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.leaky_relu(self.bn1(x), self.slope)
        out = F.leaky_relu(self.bn2(self.conv1(active)), self.slope)
        # A shortcut that changes the width starts after the activation.
        return self.conv2(out) + (x if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(
        self, inp: int, out: int, stride: int, blocks: int, slope: float, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                _Block(out if i else inp, out, 1 if i else stride, slope, shortcut)
                for i in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """A Wide ResNet, WRN-`depth`-`width`; `depth` must be 6 n + 4.

    The default is the network of TRADES, MART, AWP and RobustBench: ReLU, 1x1 convolutions as
    shortcuts, normal initialisation with variance 2 / (k k out_channels). The WRN-32-10 of FAT and
    GAIRAT ("Wide_ResNet_Madry") is the same network at depth 34: they do not count the shortcuts.
    With `slope=0.1, shortcut="pad"` it is the network of Madry et al. (2018), which EMR's code
    trains: LeakyReLU(0.1) and pooled, channel-padded shortcuts.
    Parameter names are those of the published checkpoints. Loading ignores the unused `sub_block1`
    in checkpoints of TRADES and its relatives.
    """

    def __init__(
        self,
        depth: int = 34,
        width: int = 10,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        slope: float = 0.0,
        shortcut: Shortcut = "conv",
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1, got {depth}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be 'conv' or 'pad', got {shortcut!r}")
        self.slope = slope
        blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = _Stage(widths[0], widths[1], 1, blocks, slope, shortcut)
        self.block2 = _Stage(widths[1], widths[2], 2, blocks, slope, shortcut)
        self.block3 = _Stage(widths[2], widths[3], 2, blocks, slope, shortcut)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        self.register_load_state_dict_pre_hook(_drop_sub_block)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.leaky_relu(self.bn1(out), self.slope)
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _drop_sub_block(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}sub_block1.")]:
        del state[key]
