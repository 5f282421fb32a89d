"""Keyed noise agrees with an independent Philox, row hashes with Python integers."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from inputs import DTYPES, LAYOUTS, SHAPES, assert_same_bits, expanded, normal, with_specials

from pyadv import ops, reference

SIGNIFICAND = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 24}


def philox(counter, key):
    """Compute Philox 4x32-10 on NumPy's unsigned integers; counter and key are sequences of
    words."""
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.uint64(word) for word in key)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = second >> half ^ b ^ k0, second & low, first >> half ^ d ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return a, b, c, d


def words(n, ids, seed, stream):
    """Return (B, n) words for the documented counter."""
    element = np.arange(n, dtype=np.uint64)
    rows = []
    for id in ids:
        id, key = id % 2**64, seed % 2**64
        counter = (element // np.uint64(4), stream, id % 2**32, id >> 32)
        block = np.stack(np.broadcast_arrays(*philox(counter, (key % 2**32, key >> 32))))
        rows.append(block[np.arange(n) % 4, np.arange(n)])
    return np.stack(rows) if rows else np.zeros((0, n), np.uint64)


def test_the_oracle_knows_the_published_answers():
    ones = 0xFFFFFFFF
    zero = [f"{int(w):08x}" for w in philox((0, 0, 0, 0), (0, 0))]
    assert zero == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    one = [f"{int(w):08x}" for w in philox((ones, ones, ones, ones), (ones, ones))]
    assert one == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def ids_for(rows, device="cpu"):
    """Return ids that use both 32-bit halves and both signs."""
    return (torch.arange(rows) * 0x3141592653589793 - 7).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uniform_is_the_top_bits_of_philox(shape, dtype, device):
    ids, seed, stream = ids_for(shape[0]), 2**63 + 12345678901, 0xFFFFFFFE
    n = math.prod(shape[1:])
    bits = SIGNIFICAND[dtype]
    top = (words(n, ids.tolist(), seed, stream) >> np.uint64(32 - bits)).astype(np.float64)
    expected = torch.from_numpy(top * 2.0**-bits).reshape(shape).to(dtype)
    like = torch.empty(shape, dtype=dtype, device=device)
    u = ops.keyed_uniform(like, ids.to(device), seed, stream)
    assert_same_bits(u.cpu(), expected)
    assert (u < 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_depends_on_the_place_in_the_row_not_on_the_layout(layout, dtype, device):
    for shape in ((3, 3, 5, 7), (2, 4, 4, 4), (5, 33)):
        like = LAYOUTS[layout](torch.zeros(shape, dtype=dtype, device=device))
        ids = ids_for(shape[0], device)
        for op, spec in (
            (ops.keyed_uniform, reference.keyed_uniform),
            (ops.keyed_normal, reference.keyed_normal),
        ):
            noise = op(like, ids, 3, 4)
            assert torch.equal(noise, op(like.contiguous(), ids, 3, 4))
            expected = spec(like, ids, 3, 4)
            assert noise.stride() == expected.stride() == torch.empty_like(like).stride()
            if op is ops.keyed_uniform:
                assert_same_bits(noise, expected)
            else:
                assert_close_in_ulps(noise, expected, 4)


def assert_close_in_ulps(actual, expected, ulps):
    scale = expected.double().abs().clamp_min(torch.finfo(expected.dtype).tiny)
    error = (actual.double() - expected.double()).abs() / scale
    assert error.max() <= ulps * torch.finfo(expected.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normal_is_box_muller_on_pairs_of_words(shape, dtype, device):
    ids, n = ids_for(shape[0]), math.prod(shape[1:])
    pairs = words(n + n % 2, ids.tolist(), -5, 9).reshape(shape[0], (n + 1) // 2, 2)
    u, v = (pairs >> np.uint64(8)).astype(np.float64).transpose(2, 0, 1) * 2.0**-24
    radius = np.sqrt(-2 * np.log1p(-u))
    z = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=-1)
    exact = torch.from_numpy(z.reshape(shape[0], n + n % 2)[:, :n].reshape(shape))
    like = torch.empty(shape, dtype=dtype, device=device)
    noise = ops.keyed_normal(like, ids.to(device), -5, 9).cpu()
    assert noise.dtype == dtype
    # The oracle rounds its angle, so its error near the zeros of sin and cos is absolute.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(noise.double(), exact, rtol=tolerance, atol=1e-14)


def test_a_row_has_its_noise_in_any_batch_and_order(device):
    like, ids = torch.empty(6, 3, 5, device=device), ids_for(6, device)
    order = torch.tensor([4, 1, 5, 0, 3, 2], device=device)
    for op in (ops.keyed_uniform, ops.keyed_normal):
        whole = op(like, ids, 1, 2)
        assert torch.equal(op(like, ids[order], 1, 2), whole[order])
        for i in range(6):
            assert torch.equal(op(like[i : i + 1], ids[i : i + 1], 1, 2), whole[i : i + 1])
        same = op(like, expanded(ids[:1], 6).flatten(), 1, 2)
        assert torch.equal(same, whole[:1].expand_as(whole))


def test_every_bit_of_the_key_counts(device):
    like = torch.empty(1, 64, device=device)
    base = ops.keyed_uniform(like, torch.zeros(1, dtype=torch.int64, device=device), 0, 0)
    seen = [base]
    for bit in range(64):
        id = torch.tensor([1 << bit if bit < 63 else -(2**63)], device=device)
        seen.append(ops.keyed_uniform(like, id, 0, 0))
        seen.append(ops.keyed_uniform(like, torch.zeros_like(id), 1 << bit, 0))
        if bit < 32:
            seen.append(ops.keyed_uniform(like, torch.zeros_like(id), 0, 1 << bit))
    assert torch.cat(seen).unique(dim=0).shape[0] == 1 + 2 * 64 + 32


def test_seed_and_stream_are_ints_or_live_tensors(device):
    like, ids = torch.empty(2, 9, device=device), ids_for(2, device)
    for seed, stream in ((0, 0), (-1, 7), (2**63 - 1, 2**32 - 1), (-(2**63), 1)):
        given = ops.keyed_normal(like, ids, seed, stream)
        for place in ("cpu", device):
            tensors = torch.tensor(seed, device=place), torch.tensor(stream, device=place)
            assert torch.equal(ops.keyed_normal(like, ids, *tensors), given)
    as_unsigned = ops.keyed_uniform(like, ids, 2**64 - 1, 0)
    assert torch.equal(as_unsigned, ops.keyed_uniform(like, ids, -1, 0))
    high = torch.tensor(2**32 + 5, device=device)
    low = ops.keyed_uniform(like, ids, 0, 5)
    assert torch.equal(ops.keyed_uniform(like, ids, 0, high), low)


def test_noise_leaves_the_generator_alone_and_never_requires_grad(device):
    like = torch.zeros(3, 4, device=device, requires_grad=True)
    state = torch.get_rng_state()
    for op in (ops.keyed_uniform, ops.keyed_normal):
        assert not op(like, ids_for(3, device), 1, 2).requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_moments_and_tails(device):
    like, ids = torch.empty(64, 65536, device=device), torch.arange(64, device=device)
    u = ops.keyed_uniform(like, ids, 0, 0).double()
    n = u.numel()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * n)
    z = ops.keyed_normal(like, ids, 0, 0).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert z.abs().max() <= math.sqrt(48 * math.log(2)) * (1 + 1e-6)
    for axis in (0, 1):  # neighbours within a row and between rows are uncorrelated
        moved = z.roll(1, axis)
        assert abs((z * moved).mean()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("name", ["keyed_uniform", "keyed_normal"])
def test_noise_is_a_well_formed_op(name, device):
    op = getattr(torch.ops.pyadv, name).default
    for shape in ((2, 3, 4, 5), (0, 3), (3, 5)):
        for requires_grad in (False, True):
            like = torch.zeros(shape, device=device, requires_grad=requires_grad)
            key = torch.tensor(3), torch.tensor(4, device=device)
            torch.library.opcheck(op, (like, ids_for(shape[0], device), *key))


@pytest.mark.parametrize("op", [ops.keyed_uniform, ops.keyed_normal])
def test_noise_refuses_bad_arguments(op, device):
    like, ids = torch.empty(3, 4, device=device), torch.arange(3, device=device)
    name = op.__name__
    for error, message, args in (
        (TypeError, "like must be float16", (like.int(), ids, 0, 0)),
        (ValueError, "like must have a batch dimension", (like[0, 0], ids, 0, 0)),
        (TypeError, "ids must be a torch.int64 tensor", (like, ids.int(), 0, 0)),
        (ValueError, r"ids must have shape \[3\]", (like, ids[:2], 0, 0)),
        (TypeError, "seed must be an int or a Tensor, got float", (like, ids, 0.0, 0)),
        (TypeError, "seed must be an int or a 0-dim torch.int64", (like, ids, ids, 0)),
        (ValueError, "seed must be in", (like, ids, 2**64, 0)),
        (ValueError, r"stream must be in \[0, 4294967296\), got -1", (like, ids, 0, -1)),
        (ValueError, "stream must be in", (like, ids, 0, 2**32)),
    ):
        with pytest.raises(error, match=f"{name}: {message}"):
            op(*args)
    with pytest.raises(ValueError, match="at most 2.34 elements, got 17179869185"):
        op(torch.empty(3, 1, device="meta").expand(3, 2**34 + 1), ids.to("meta"), 0, 0)


def hash_of(values):
    """Compute the documented hash on Python integers."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    total = 0
    for i, value in enumerate(values):
        value = math.nan if value != value else value + 0.0  # -0.0 + 0.0 is 0.0
        (bits,) = struct.unpack("<Q", struct.pack("<d", value))
        total += mix((bits + 0x9E3779B97F4A7C15 * (i + 1)) % 2**64)
    hashed = mix(total % 2**64)
    return hashed - 2**64 if hashed >= 2**63 else hashed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_hash_equals_python_integers(shape, dtype, device):
    x = with_specials(normal(shape, dtype, device=device))
    expected = [hash_of(row.double().flatten().tolist()) for row in x.cpu()]
    hashed = ops.row_hash(x)
    assert hashed.dtype == torch.int64 and hashed.tolist() == expected
    assert torch.equal(hashed, reference.row_hash(x))


def test_row_hash_depends_on_values_and_places_alone(device):
    x = normal((4, 3, 6, 5), torch.float16, device=device)
    hashed = ops.row_hash(x)
    for layout in LAYOUTS.values():
        assert torch.equal(ops.row_hash(layout(x)), hashed)
    assert torch.equal(ops.row_hash(x.flatten(1)), hashed)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(ops.row_hash(x.to(dtype)), hashed)
    assert torch.equal(ops.row_hash(x[2:3]), hashed[2:3])
    assert torch.equal(ops.row_hash(expanded(x[1], 3)), hashed[1].expand(3))
    assert not torch.isin(ops.row_hash(x.flip(-1)), hashed).any()
    assert not torch.isin(ops.row_hash(x.transpose(-1, -2)), hashed).any()
    zeros = torch.zeros(1, 5, device=device)
    assert torch.equal(ops.row_hash(-zeros), ops.row_hash(zeros))
    assert not torch.equal(ops.row_hash(zeros[:, :4]), ops.row_hash(zeros))


def test_row_hash_tells_8_bit_images_apart(device):
    """Different images get different hashes: one pixel changed, pixels shifted, values scaled."""
    image = (torch.arange(32, device=device) * 37 % 256).float() / 255
    changed = image.repeat(32, 1)
    changed.diagonal().add_(1 / 255)
    swapped = torch.stack([image.roll(k) for k in range(32)])
    scaled = torch.outer(torch.arange(1, 33, device=device), image)
    rows = torch.cat([changed, swapped, scaled[1:]])
    hashed = ops.row_hash(rows)
    assert hashed.unique().numel() == rows.unique(dim=0).shape[0]
    # Each bit is set in about half of the hashes.
    bits = (hashed[:, None] >> torch.arange(64, device=device)) & 1
    assert ((bits.float().mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(len(rows))).all()


def test_row_hash_is_a_well_formed_op(device):
    for shape in ((2, 3, 4), (0, 3), (3, 0)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        assert not ops.row_hash(x).requires_grad
        torch.library.opcheck(torch.ops.pyadv.row_hash.default, (x,))
    with pytest.raises(TypeError, match="row_hash: x must be float16"):
        ops.row_hash(torch.zeros(3, 4, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="row_hash: x must have a batch dimension"):
        ops.row_hash(torch.tensor(1.0, device=device))
