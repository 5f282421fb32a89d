"""Hostile tensors and numbers: shapes, values, memory layouts, and what is no tensor at all."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import inputs
import numpy as np
import torch
from torch import Tensor, nn

from fuzz.case import Draw

_SIZES = (1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
_MOST_ELEMENTS = 6000
_MOST_ROOM = 2_000_000  # elements of the storage behind a tensor with large strides


def shape(draw: Draw, dims: tuple[int, ...] = (1, 2, 2, 3, 4, 4, 5)) -> tuple[int, ...]:
    """Of (B, ...); now and then with no rows or no elements, or long rows."""
    n = draw.choice(dims)
    if n == 2 and draw.chance(0.1):
        return draw.choice((1, 2, 3)), draw.choice((1023, 1025, 4097, 20_001))
    sizes = [draw.choice(_SIZES) for _ in range(n)]
    while math.prod(sizes) > _MOST_ELEMENTS:
        sizes[sizes.index(max(sizes))] //= 2
    if draw.chance(0.08):
        sizes[draw.randrange(n)] = 0
    return tuple(sizes)


def floats(draw: Draw, size: tuple[int, ...], dtype: torch.dtype, tame: bool = False) -> Tensor:
    """Values of one of several kinds; tame ones are finite and of ordinary size."""
    g = draw.generator()
    kinds = ["uniform", "normal", "ties", "zeros", "flat rows"]
    if not tame:
        kinds += ["specials", "subnormal", "huge", "mixed"]
    kind = draw.choice(kinds)
    t = torch.rand(size, generator=g, dtype=torch.float64)
    if kind in ("normal", "mixed"):
        t = torch.randn(size, generator=g, dtype=torch.float64)
    if kind == "ties":
        t = (t * 4).round() / 4
    elif kind == "zeros":
        t = t * 0 * draw.choice((1.0, -1.0))
    elif kind == "flat rows" and t.dim() > 1:
        t = t[..., :1].expand(size).clone()
    elif kind == "subnormal":
        t = (t - 0.5) * torch.finfo(dtype).smallest_normal
    elif kind == "huge":
        t = (t - 0.5) * torch.finfo(dtype).max
    elif kind == "mixed":
        t = t * 10.0 ** torch.randint(-30, 20, size, generator=g)
    t = t.to(dtype)
    return inputs.with_specials(t, draw.getrandbits(30)) if kind == "specials" else t


def laid_out(draw: Draw, t: Tensor) -> Tensor:
    """The same values in another memory layout."""
    kind = draw.choice(("plain", "plain", "named", "gaps", "expanded", "huge strides"))
    if kind == "named":
        return inputs.LAYOUTS[draw.choice(list(inputs.LAYOUTS))](t)
    if kind == "gaps":
        return placed(draw, t, lambda: draw.choice((1, 1, 2, 3)))
    if kind == "huge strides":
        return placed(draw, t, lambda: draw.choice((1, 7, 64, 1000)))
    if kind == "expanded" and t.numel():
        for d in range(t.dim()):
            if draw.chance(0.4):
                t = t.narrow(d, 0, 1).clone().expand(t.shape)
                # Only the chosen dimension lies once in memory.
    return t


def placed(draw: Draw, t: Tensor, factor: Any) -> Tensor:
    """A copy in a larger storage of its own: dimensions in any order, gaps, any first element."""
    order = list(range(t.dim()))
    draw.shuffle(order)
    strides, step = [0] * t.dim(), 1
    for d in order:
        step *= factor()
        strides[d] = step
        step *= max(t.shape[d], 1)
    first = draw.choice((0, 1, 3))
    room = first + step + 4
    if room > _MOST_ROOM:
        return t
    storage = torch.full((room,), 7, dtype=t.dtype, device=t.device)
    return storage.as_strided(t.shape, strides, first).copy_(t)


def number(draw: Draw, nonnegative: bool = True) -> float:
    choices = [0.0, 1e-3, 8 / 255, 0.1, 0.3, 1.0, 2.5, 1e-40, 1e6, 100.0]
    if not nonnegative:
        choices += [-0.1, -1.0, -1e6]
    return draw.choice(choices)


def parameter(
    draw: Draw, x: Tensor, per_row: bool = False, nonnegative: bool = True, top: float | None = None
) -> Any:
    """A legal size: a float, an int, or a tensor of any legal shape and real dtype."""
    value = number(draw, nonnegative) if top is None else draw.choice((0.0, 0.3, 0.75, top))
    kind = draw.choice(("float", "float", "int", "0-dim", "rows", "rows", "one", "wide"))
    if kind == "float":
        return value
    if kind == "int":
        return min(math.ceil(value), 1000)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, x.dtype))
    if value > 1e4 or 0 < abs(value) < 1e-4:
        dtype = torch.float32
    if kind == "0-dim":
        return torch.tensor(value, dtype=dtype)
    size: tuple[int, ...] = (x.shape[0],)
    if kind == "one":
        size = draw.choice(((1,), (1,) * x.dim()))
    if kind == "wide":
        size = (x.shape[0], *(1,) * (x.dim() - 1))
        if not per_row:
            size = tuple(draw.choice((1, n)) for n in x.shape)[draw.choice((0, 0, 1)) :]
            if len(size) == 1 and x.dim() > 1:
                size = (1, *size)  # 1-D is per row
    t = torch.rand(size, generator=draw.generator(), dtype=torch.float64)
    t = t * value if top is not None or nonnegative else (t - 0.5) * 2 * value
    t = t.to(dtype)
    return laid_out(draw, t) if draw.chance(0.4) else t


def bounds(draw: Draw, x: Tensor) -> tuple[Any, Any]:
    """A legal box."""
    kind = draw.choice(("unit", "unit", "none", "half", "numbers", "tensors"))
    if kind == "unit":
        return 0.0, 1.0
    if kind == "none":
        return None, None
    if kind == "half":
        return draw.choice(((None, 1.0), (0.0, None), (-math.inf, 1.0)))
    if kind == "numbers":
        return draw.choice(((-2.0, 3), (0.25, 0.25), (-1e30, 1e30)))
    size = tuple(draw.choice((1, n)) for n in x.shape) if x.dim() > 1 else x.shape
    lo = torch.rand(size, generator=draw.generator()).to(x.dtype) - 1
    return laid_out(draw, lo), laid_out(draw, lo.abs() + 0.5)


def wrong(draw: Draw, value: Any) -> Any:
    """What somebody might pass by mistake where `value` is right. Some of it is legal too."""
    anything: list[Any] = [None, "0.1", [0.5], np.zeros(3), object(), {}, float]
    if isinstance(value, Tensor):
        with torch.no_grad():
            return draw.choice(
                [
                    *anything,
                    lambda: value.to(torch.int32),
                    lambda: value.to(torch.bool),
                    lambda: value.to(torch.complex64),
                    lambda: value.double() if value.dtype != torch.float64 else value.float(),
                    lambda: value[None],
                    lambda: value.flatten(),
                    lambda: value.new_zeros(()),
                    lambda: value.new_zeros([n + 1 for n in value.shape[:1]] + [*value.shape[1:]]),
                    lambda: value.to("meta"),
                    lambda: value.to_sparse(),
                    lambda: value.numpy() if value.dtype != torch.bfloat16 else None,
                    lambda: value.T if value.dim() == 2 else value.mT if value.dim() > 2 else value,
                    lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
                    lambda: 0.5,
                ]
            )
    if isinstance(value, bool) or value is None:
        return draw.choice([*anything, 1, -3, math.nan, torch.ones(())])
    if isinstance(value, str):
        return draw.choice([*anything, "", value.upper() + " ", 3, value + "x"])
    if isinstance(value, int):
        return draw.choice([*anything, -1, 0, 2**63, 2**70, True, 1.5, np.int64(2), math.nan])
    return draw.choice(
        [
            *anything,
            math.nan,
            math.inf,
            -math.inf,
            -0.1,
            -1,
            True,
            10**400,
            1 + 2j,
            np.float32(0.1),
            np.float64(0.1),
            np.array(0.1),
            Fraction(1, 3),
            torch.tensor(math.nan),
            torch.tensor(True),
            torch.tensor(1 + 2j),
            torch.tensor(3),
            torch.rand(77),
            torch.rand(2, 3, 1, 1, 1, 1, 1),
            torch.empty(0),
            torch.rand((), device="meta"),
            torch.rand((), requires_grad=True),
        ]
    )


def disguised(draw: Draw, t: Tensor) -> Tensor:
    """The same values as a tensor of another kind, which every op must take as it is."""
    kind = draw.choice(("requires_grad", "parameter", "inference", "view", "non-leaf", "negative"))
    if kind == "inference":
        with torch.inference_mode():
            return t.clone()
    if kind == "view":
        return t.detach()
    if not t.is_floating_point():
        return t
    if kind == "requires_grad":
        return t.detach().requires_grad_()
    if kind == "parameter":
        return nn.Parameter(t)
    if kind == "negative":  # a lazy negation, as torch makes of the imaginary part of a conjugate
        return torch._neg_view(-t)
    return t.detach().requires_grad_() * 1
