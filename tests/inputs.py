"""Awkward inputs that the tests of all ops share: shapes, dtypes, memory layouts, special values.

Each function uses its own generator, so that the inputs of a test do not depend on the tests that
ran before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# (B, ...): sizes around the widths of SIMD and 16-byte accesses, one row, one element, no rows and
# no elements.
SHAPES = (
    (4, 3, 8, 8),
    (2, 3, 5, 7),
    (1, 3, 17, 1),
    (3, 15),
    (3, 16),
    (2, 33),
    (5, 1),
    (1,),
    (7,),
    (0, 3, 4, 4),
    (2, 0, 4),
)

# Rows of logits: (B, C).
LOGIT_SHAPES = ((4, 10), (1, 2), (3, 3), (5, 15), (2, 16), (3, 33), (2, 1000), (0, 10))

SPECIALS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, 1.0)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _sliced(t: Tensor) -> Tensor:
    """Copy into dense memory that starts one element after a 16-byte boundary."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].view(t.shape).copy_(t)


def _strided(t: Tensor) -> Tensor:
    """Copy with gaps between the elements of the last dimension."""
    room = torch.empty((*t.shape, 2), dtype=t.dtype, device=t.device)
    return room[..., 0].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """Copy with the batch as the innermost dimension in memory."""
    room = torch.empty(tuple(reversed(t.shape)), dtype=t.dtype, device=t.device)
    return room.permute(tuple(reversed(range(t.dim())))).copy_(t)


# Each function returns the values of its argument in another memory layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "sliced": _sliced,
    "strided": _strided,
    "transposed": _transposed,
}


def expanded(row: Tensor, rows: int) -> Tensor:
    """Return a row (...) as a batch (rows, ...) that holds it in memory once."""
    return row.expand(rows, *row.shape)


def layout_pairs() -> Iterator[tuple[str, str]]:
    """Yield pairs of layout names for two arguments: each layout with contiguous and with
    itself."""
    for name in LAYOUTS:
        yield name, "contiguous"
        if name != "contiguous":
            yield "contiguous", name
            yield name, name


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    t = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return (low + (high - low) * t).to(dtype).to(device)


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    scale: float = 1.0,
) -> Tensor:
    t = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    return (scale * t).to(dtype).to(device)


def labels(rows: int, classes: int, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    return torch.randint(classes, (rows,), generator=generator(seed)).to(device)


def alternating(rows: int, device: str | torch.device = "cpu") -> Tensor:
    """Return a bool mask (rows,): True, False, True, ..."""
    return (torch.arange(rows) % 2 == 0).to(device)


def with_specials(t: Tensor, seed: int = 0) -> Tensor:
    """Return a copy of `t` with SPECIALS (as many as it has room for) at random places."""
    flat = t.detach().clone(memory_format=torch.contiguous_format).flatten()
    count = min(len(SPECIALS), flat.numel())
    places = torch.randperm(flat.numel(), generator=generator(seed))[:count].to(t.device)
    flat[places] = torch.tensor(SPECIALS[:count], dtype=torch.float64).to(t.dtype).to(t.device)
    return flat.view(t.shape)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert equal elements (NaN equals NaN), dtype, shape and strides."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel():
        same_strides = all(
            a == e or n == 1
            for a, e, n in zip(actual.stride(), expected.stride(), actual.shape, strict=True)
        )
        assert same_strides, (actual.stride(), expected.stride())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_within_twice(actual: Tensor, by_torch: Tensor, exact: Tensor, ulps: float = 1.0) -> None:
    """Assert the accuracy of a reduction: its largest error against float64 is at most twice that
    of PyTorch in the same dtype, plus `ulps` units in the last place of the largest value."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel():
        return
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual.double()[~finite], exact.double()[~finite], rtol=0, atol=0, equal_nan=True
    )
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    allowed = 2 * (by_torch.double() - exact)[finite].abs().max().item()
    allowed += ulps * torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"
