"""Random small models, honest and hostile, and batches for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from networks import RowLinear
from torch import Tensor, nn

from fuzz.case import Draw

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


class RowNet(nn.Module):
    """Two row-wise layers, so that a sample's logits do not depend on its batch, not in one bit."""

    def __init__(self, n: int, classes: int, seed: int, dtype: torch.dtype):
        super().__init__()
        self.first = RowLinear(n, 5, seed, dtype)
        self.last = RowLinear(5, classes, seed + 1, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Noisy(nn.Module):
    """All that an attack must put back: BatchNorm, dropout, layers in several modes."""

    def __init__(self, channels: int, classes: int, dtype: torch.dtype):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.BatchNorm2d(4, momentum=None),
            nn.GELU(),
        )
        self.head = nn.Linear(4, classes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Wrapped(nn.Module):
    """A model whose logits have to be found, with the `output` that finds them."""

    def __init__(self, model: nn.Module, kind: str):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Any:
        z = self.model(x)
        if self.kind in ("tuple", "index"):
            return (z, x.sum()) if self.kind == "tuple" else (x.sum(), z)
        if self.kind in ("dict", "key"):
            return {"logits" if self.kind == "dict" else "scores": z}
        return z


OUTPUTS = {"tuple": None, "index": 1, "dict": None, "key": "scores", "callable": lambda r: r}


class Failing(nn.Module):
    """A model that raises, or answers with something else, at one of its forward passes."""

    ANSWERS = ("raise", "none", "rows", "one-dim", "nan", "integers", "text", "no grad")

    def __init__(self, model: nn.Module, answer: str, at: int):
        super().__init__()
        self.model, self.answer, self.at = model, answer, at
        self.calls = [0]  # in a list: counting is no change of an attribute

    def forward(self, x: Tensor) -> Any:
        self.calls[0] += 1
        z = self.model(x)
        if self.calls[0] < self.at:
            return z
        if self.answer == "raise":
            raise ZeroDivisionError("the user's model")
        return {
            "none": None,
            "rows": z[:-1] if len(z) else torch.cat([z, z.new_zeros(1, z.shape[1])]),
            "one-dim": z[:, 0],
            "nan": z * math.nan,
            "integers": z.long(),
            "text": "logits",
            "no grad": z.detach(),
        }[self.answer]


def batch(
    draw: Draw, images: bool, dtype: torch.dtype, lo: float = 0.0, hi: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x in [lo, hi] and labels below 3. Some values lie on the box."""
    n = draw.choice((0, 1, 2, 3, 5, 6))
    size = (draw.choice((1, 3)), draw.choice((4, 5)), 4) if images else draw.choice(((7,), (2, 3)))
    g = draw.generator()
    x = torch.rand(n, *size, generator=g, dtype=torch.float64)
    if draw.chance(0.3):
        x = (2 * x).round().clamp(0, 1) if draw.chance(0.5) else (4 * x).round() / 4
    x = (lo + (hi - lo) * x).to(dtype).clamp(lo, hi)
    return x, torch.randint(3, (n,), generator=g)


def network(
    draw: Draw, x: Tensor, classes: int, dtype: torch.dtype, rowwise: bool | None = None
) -> nn.Module:
    """A network for x in a random state: modes, gradients, frozen parameters."""
    seed, n = draw.getrandbits(20), math.prod(x.shape[1:])
    rowwise = x.dim() != 4 or draw.chance(0.5) if rowwise is None else rowwise
    if rowwise:
        kind = draw.choice((RowLinear, RowNet))
        model: nn.Module = kind(n, classes, seed, dtype)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Noisy(x.shape[1], classes, dtype)
    for m in model.modules():
        if draw.chance(0.5):
            m.training = not m.training
    for p in model.parameters():
        if draw.chance(0.3):
            p.grad = torch.full_like(p, 0.5)
        if draw.chance(0.2):
            p.requires_grad_(False)
    return model
