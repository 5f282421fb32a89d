"""Order and augmentation are functions of (seed, epoch) alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyadv.data import Batches, crop_and_flip


def batches(**settings) -> Batches:
    x = torch.rand(23, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    return Batches(x, torch.arange(23), **{"batch_size": 4, **settings})


def test_an_epoch_is_a_permutation() -> None:
    b = batches()
    seen = [ids for _, _, ids in b.epoch(1)]
    assert len(seen) == len(b) == 6 and len(seen[-1]) == 3
    assert torch.cat(seen).sort()[0].tolist() == list(range(23))
    for x, y, ids in b.epoch(2):
        assert torch.equal(x, b.x[ids]) and torch.equal(y, b.y[ids])
    orders = [torch.cat([i for *_, i in b.epoch(e)]).tolist() for e in (1, 2)]
    other = torch.cat([i for *_, i in batches(seed=1).epoch(1)]).tolist()
    assert orders[0] != orders[1] and orders[0] != other


def test_start_continues_the_epoch() -> None:
    whole = list(batches(augment=True).epoch(3))
    rest = list(batches(augment=True).epoch(3, start=2))
    assert len(rest) == 4
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not list(batches().epoch(3, start=6))


def test_torch_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(batches(augment=True).epoch(1))
    assert torch.equal(before, torch.get_rng_state())


def test_ids_choose_a_subset() -> None:
    kept = torch.tensor([3, 5, 7, 11, 13])
    ids = torch.cat([i for *_, i in batches(ids=kept, batch_size=2).epoch(1)])
    assert torch.equal(ids.sort()[0], kept)


def test_processes_share_each_batch() -> None:
    alone = [set(ids.tolist()) for *_, ids in batches(augment=True).epoch(1)]
    ranks = [list(batches(augment=True, rank=r, world=2).epoch(1)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    for step, (a, b) in enumerate(zip(*ranks, strict=True)):
        assert len(a[2]) == len(b[2]) and not set(a[2].tolist()) & set(b[2].tolist())
        union = set(a[2].tolist()) | set(b[2].tolist())
        assert union == alone[step] if step < 5 else union < alone[step]  # 3 samples are cut to 2


def test_a_last_batch_too_small_for_the_processes_is_dropped() -> None:
    b = batches(world=4, rank=3)  # 23 = 5 * 4 + 3
    assert len(b) == len(list(b.epoch(1))) == 5


def test_batch_size_must_fit() -> None:
    with pytest.raises(ValueError, match="positive multiple of 3, got 4"):
        batches(world=3)
    with pytest.raises(ValueError, match="got 0"):
        batches(batch_size=0)


def test_data_that_does_not_fit() -> None:
    x = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match="x and y must be as many, got 4 and 3"):
        Batches(x, torch.arange(3), 2)
    for ids in ([0, 4], [-1, 2]):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 4\), saw"):
            Batches(x, torch.arange(4), 2, ids=torch.tensor(ids))


def test_crop_and_flip_against_slices() -> None:
    x = torch.rand(5, 3, 8, 6)
    offsets = torch.tensor([[4, 4], [0, 8], [8, 0], [3, 5], [4, 4]])
    flips = torch.tensor([False, True, False, True, True])
    out = crop_and_flip(x, offsets, flips)
    padded = F.pad(x, (4, 4, 4, 4))
    for i, (r, c) in enumerate(offsets.tolist()):
        crop = padded[i, :, r : r + 8, c : c + 6]
        assert torch.equal(out[i], crop.flip(2) if flips[i] else crop)
    assert torch.equal(out[0], x[0]) and torch.equal(out[4], x[4].flip(2))


def test_every_offset_and_flip_occurs() -> None:
    """The border of a shifted white image shows its offset, and every offset and flip occurs."""
    b = Batches(torch.ones(2000, 1, 9, 9), torch.zeros(2000).long(), 2000, augment=True)
    x = next(iter(b.epoch(1)))[0]
    rows, cols = x.amax(3).sum(2).flatten(), x.amax(2).sum(2).flatten()
    for kept in (rows, cols):  # a shift by s keeps 9 - |s| lines; 0 comes once in 9, others twice
        share = torch.bincount(kept.long(), minlength=10)[5:] / 2000
        assert share.tolist() == pytest.approx([2 / 9] * 4 + [1 / 9], abs=0.04)
