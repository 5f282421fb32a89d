"""Noise as a function of a key: a sample gets the same noise in any batch and order, in any process
and on any device. Torch's generator is not used.

The bits come from the counter-based generator Philox 4x32-10 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011). Element e of a row, counted in row-major order whatever the
memory layout, reads word e mod 4 of the block with the counter (e div 4, stream, low and high half
of the row's id) and the key (low and high half of seed).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyadv import reference
from pyadv.ops.arguments import check_like, check_rows, word
from pyadv.ops.registry import like_first, register

_MOST_ELEMENTS = 2**34  # of a row: the block counter has 32 bits

_keyed_uniform = register(
    "keyed_uniform(Tensor like, Tensor ids, Tensor seed, Tensor stream) -> Tensor",
    reference.keyed_uniform,
    like_first,
)
_keyed_normal = register(
    "keyed_normal(Tensor like, Tensor ids, Tensor seed, Tensor stream) -> Tensor",
    reference.keyed_normal,
    like_first,
)
_row_hash = register(
    "row_hash(Tensor x) -> Tensor",
    reference.row_hash,
    lambda x: x.new_empty(x.shape[:1], dtype=torch.int64),
)


def keyed_uniform(like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor) -> Tensor:
    """Draw uniform noise in [0, 1): u = (word >> 8) 2^-24.

    Equal bit for bit to `reference.keyed_uniform`, on every device. float64 gets the values of
    float32; float16 and bfloat16 get them rounded down to multiples of 2^-11 and 2^-8, since
    rounding to nearest could give 1.

    Args:
        like: (B, ...), gives shape, dtype, device and memory layout; its values are not read.
        ids: (B,) int64, one key per sample.
        seed: 64 bits, an int in [-2^63, 2^64) or a 0-dim int64 tensor.
        stream: 32 bits, an int in [0, 2^32) or a 0-dim int64 tensor (its low 32 bits count). Draws
            with different streams are independent.
            A tensor on the device of `like` is read when the kernel runs, so each replay of a CUDA
            graph draws with the value it then has.

    Raises:
        TypeError: another dtype. ValueError: wrong shapes or devices, seed or stream out of range,
            or rows of more than 2^34 elements.
    """
    return _keyed_uniform(*_checked("keyed_uniform", like, ids, seed, stream))


def keyed_normal(like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor) -> Tensor:
    """Draw standard normal noise by Box-Muller from the words (0, 1) and (2, 3) of each block.

    With u and v the uniforms of the two words, the pair is sqrt(-2 log(1 - u)) times cos(2 pi v)
    and sin(2 pi v), computed in float32 (float64 for float64). The kernels agree with each other
    bit for bit in float32, and with the exact value, which `reference.keyed_normal` rounds, to
    4 units in the last place. No value is above sqrt(48 log 2) = 5.77 in magnitude.

    Arguments and errors are those of `keyed_uniform`.
    """
    return _keyed_normal(*_checked("keyed_normal", like, ids, seed, stream))


def row_hash(x: Tensor) -> Tensor:
    """Return a 64-bit hash of each row's values, (B,) int64; it is the default sample id.

    It depends only on the values and their row-major places: not on the memory layout, the other
    rows, the device, or the dtype if the values are equal (0.1 in float16 differs from 0.1 in
    float32). -0.0 counts as 0.0, and all NaN are equal. It is no cryptographic hash.

    With bits_i the 64 bits of value i in float64 and mix the finaliser of splitmix64 (Steele et
    al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014):
    mix(sum_i mix(bits_i + (i + 1) 0x9E3779B97F4A7C15)) modulo 2^64.

    Raises:
        TypeError: not a floating-point tensor. ValueError: no batch dimension.
    """
    check_like("row_hash", "x", x)
    return _row_hash(x)


def _checked(
    op: str, like: Tensor, ids: Tensor, seed: int | Tensor, stream: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_like(op, "like", like)
    check_rows(op, "ids", ids, like, torch.int64)
    if like.numel() > _MOST_ELEMENTS * like.shape[0]:
        raise ValueError(
            f"{op}: a row of like must have at most 2^34 elements, "
            f"got {like.numel() // like.shape[0]}"
        )
    return (
        like,
        ids,
        word(op, "seed", seed, like, -(2**63), 2**64),
        word(op, "stream", stream, like, 0, 2**32),
    )
