"""First iterates of attacks, and the noise they draw.

Keyed noise depends on (seed, draw, sample id, restart, step) alone. An adversarial example
therefore does not depend on the batch its sample came in, and torch's generator keeps its state.
"uniform" and "normal_small" draw from that generator, as the official codes do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyadv import ops
from pyadv.menus import AnyNorm, AnyStartName, SphereStartName, StartName
from pyadv.tensors import broadcastable, per_row, row_norm, widen

PROJECT: dict[AnyNorm, Callable[..., Tensor]] = {
    "Linf": ops.linf_project,
    "L2": ops.l2_project,
    "L1": ops.l1_project,
}

StartFunction = Callable[[Tensor], Tensor]
Start = StartName | StartFunction
SphereStart = SphereStartName | StartFunction
AnyStart = AnyStartName | StartFunction
SMALL = 0.001  # standard deviation of "normal_small", in units of x (TRADES, MART, MAIL)

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that draws 0, 1, 2, ... give 2^64 different keys
_KINDS = 4
_LARGEST = 1 - 2**-24  # the largest float32 below 1


def _signed(word: int) -> int:
    """Return the int64 with the bits of a 64-bit word."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word


@dataclass
class Noise:
    """The keyed noise of one call of an attack. `kind` separates draws made at the same step."""

    ids: Tensor
    key: int | Tensor  # 64 bits that belong to this call: an int or a 0-dim int64 tensor

    @classmethod
    def of(cls, ids: Tensor, seed: int, draw: int) -> Noise:
        """Return the noise of draw number `draw`."""
        return cls(ids, _signed(int(seed) + int(draw) * _GOLDEN))

    def restarted(self, n: int) -> Noise:
        """Return the noise of a batch repeated n times. Restart 0 of a sample keeps its id; every
        other restart gets a new one."""
        shifts = torch.arange(n, device=self.ids.device) * _signed(_GOLDEN)  # wraps, as ids may
        return replace(self, ids=(self.ids + shifts[:, None]).flatten())

    def uniform(self, like: Tensor, step: int | Tensor = 0, kind: int = 0) -> Tensor:
        """Return uniform noise in [0, 1)."""
        return ops.keyed_uniform(like, self.ids, self.key, step * _KINDS + kind)

    def normal(self, like: Tensor, step: int | Tensor = 0, kind: int = 0) -> Tensor:
        """Return standard normal noise."""
        return ops.keyed_normal(like, self.ids, self.key, step * _KINDS + kind)


class GeneratorNoise:
    """Noise with the interface of `Noise`, from torch's own generator."""

    def uniform(self, like: Tensor, step: int | Tensor = 0, kind: int = 0) -> Tensor:
        """Return uniform noise in [0, 1)."""
        return torch.rand_like(like)

    def normal(self, like: Tensor, step: int | Tensor = 0, kind: int = 0) -> Tensor:
        """Return standard normal noise."""
        return torch.randn_like(like)


def laplace(source: Noise | GeneratorNoise, like: Tensor) -> Tensor:
    """Return standard Laplace noise in the shape and dtype of `like`. All values are finite."""
    u = 2 * source.uniform(like) - 1  # in [-1, 1), and -1 would give infinity
    return -torch.sign(u) * torch.log1p(-u.abs().clamp_max(_LARGEST))


def start(
    kind: AnyStart,
    norm: AnyNorm,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
    noise: Noise,
) -> Tensor:
    """Return the first iterate, a new tensor with the layout of x."""
    if callable(kind):
        first = kind(x)
        if first.shape != x.shape:
            raise ValueError(
                f"attack: start must return the shape of x, {list(x.shape)}, "
                f"got {list(first.shape)}"
            )
        return torch.empty_like(x).copy_(first.detach())
    if kind == "none":
        return torch.empty_like(x).copy_(x)
    if kind == "normal_small":  # not projected: the official codes leave that to the first step
        return x + SMALL * torch.randn_like(x)
    source = noise if kind == "keyed" else GeneratorNoise()
    wide = widen(x)  # 16-bit noise would be coarse
    radius = broadcastable(eps, wide)
    if norm == "Linf":
        if kind == "uniform" and not isinstance(eps, Tensor):
            delta = torch.empty_like(wide).uniform_(-eps, eps)
        else:
            delta = (2 * source.uniform(wide) - 1) * radius
        return PROJECT[norm]((wide + delta).to(x.dtype), x, eps, lo, hi)
    # A point is uniform in the ball if (r / eps)^n is uniform, for its radius r in n dimensions.
    if norm == "L2":
        direction = source.normal(wide)
        length = per_row(row_norm(direction, 2), direction)
    else:
        direction = laplace(source, wide)
        length = per_row(row_norm(direction, 1), direction)
    share = source.uniform(wide.flatten(1)[:, :1], kind=1) ** (1.0 / max(x[:1].numel(), 1))
    unit = direction / length.clamp_min(torch.finfo(length.dtype).tiny)
    point = wide + unit * per_row(share[:, 0], wide) * radius
    return PROJECT[norm](point.to(x.dtype), x, eps, lo, hi)


def start_on_sphere(
    kind: AnyStart,
    norm: AnyNorm,
    x: Tensor,
    eps: float | Tensor,
    lo: float | Tensor | None,
    hi: float | Tensor | None,
    noise: Noise,
) -> Tensor:
    """Return the first iterate of APGD, on the border of the ball: a uniform point of the cube
    scaled to its faces (Linf), a normal direction (L2), or a projected normal point (L1)."""
    if callable(kind) or kind == "none":
        return start(kind, norm, x, eps, lo, hi, noise)
    source = noise if kind == "keyed" else GeneratorNoise()
    wide = widen(x)
    offset = 2 * source.uniform(wide) - 1 if norm == "Linf" else source.normal(wide)
    if norm != "L1":
        length = per_row(row_norm(offset, 2 if norm == "L2" else torch.inf), offset)
        offset = (
            offset / length.clamp_min(torch.finfo(length.dtype).tiny) * broadcastable(eps, wide)
        )
    return PROJECT[norm]((wide + offset).to(x.dtype), x, eps, lo, hi)
