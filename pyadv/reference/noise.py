"""Counter-based noise and row hashes, in plain PyTorch.

The ops of the same names in `pyadv.ops` take the same arguments, and the tests compare their
kernels with these functions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyadv.tensors import compute_dtype

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

# Bits of a draw: as many as the significand holds, so that rounding cannot give 1.
_UNIFORM_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 24}


def keyed_uniform(like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor) -> Tensor:
    """Return u = (word >> 8) 2^-24. See `ops.keyed_uniform`."""
    bits = _UNIFORM_BITS[like.dtype]
    u = (_words(like, ids, seed, stream) >> (32 - bits)).double() * 2.0**-bits
    return _shaped(u.to(like.dtype), like)


def keyed_normal(like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor) -> Tensor:
    """Return normal numbers by Box-Muller on pairs of words, in float64, rounded at the end. See
    `ops.keyed_normal`."""
    pairs = _words(like, ids, seed, stream, even=True).unflatten(1, (-1, 2))
    u, v = ((pairs >> 8).double() * 2.0**-24).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(1.0 - u))  # 1 - u is never 0
    # The angle within a quarter turn is exact, so that cos and sin give exact zeros.
    quarter = torch.round(4.0 * v)
    cos, sin = (f((4.0 * v - quarter) * (math.pi / 2)) for f in (torch.cos, torch.sin))
    turned = torch.where(quarter % 2 == 1, -sin, cos), torch.where(quarter % 2 == 1, cos, sin)
    sign = torch.where((quarter == 2) | (quarter == 3), -1.0, 1.0)
    z = torch.stack([radius * sign * t for t in turned], dim=-1).flatten(1)
    return _shaped(z[:, : like[:1].numel()].to(compute_dtype(like.dtype)).to(like.dtype), like)


def row_hash(x: Tensor) -> Tensor:
    """Return mix(sum_i mix(bits_i + golden (i + 1))) modulo 2^64. See `ops.row_hash`."""
    v = x.double().reshape(x.shape[0], math.prod(x.shape[1:]))
    v = torch.where(v == 0, 0.0, torch.where(v.isnan(), math.nan, v))  # equal zeros and equal NaNs
    place = torch.arange(1, v.shape[1] + 1, device=x.device) * _signed(_GOLDEN)
    return _mix(_mix(v.view(torch.int64) + place).sum(1))


def _words(
    like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor, even: bool = False
) -> Tensor:
    """Return (B, n) Philox words as int64, where n is the number of elements of a row, rounded up
    to even."""
    n = like[:1].numel()
    n += n % 2 if even else 0
    block = torch.arange((n + 3) // 4, device=like.device)
    stream, seed = (_int64(t, like.device) for t in (stream, seed))
    row = ids[:, None]
    counter = (block, stream & _WORD, row & _WORD, (row >> 32) & _WORD)
    words = _philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    full = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    return full.flatten(1)[:, :n]


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Compute Philox 4x32-10 on 32-bit words held in int64: products wrap, shifts are masked."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _mix(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64."""
    z = (z ^ _shift(z, 30)) * _signed(_MIX[0])
    z = (z ^ _shift(z, 27)) * _signed(_MIX[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _int64(value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), _signed(value), dtype=torch.int64, device=device)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, requires_grad=False).copy_(rows.reshape(like.shape))
