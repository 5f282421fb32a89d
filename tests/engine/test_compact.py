"""Compaction: released rows leave the batch, and the result is that of the masked attack.

The tests delay the counts of active rows on the CPU, as a GPU does.
"""

from __future__ import annotations

import pytest
import torch
from networks import Recorded, RowLinear

from pyadv.attacks import APGD, CW, FAB, FriendlyPGD, PGDPlus, Square
from pyadv.engine import compact
from pyadv.engine.compact import Remaining, first_active, may_compact
from pyadv.engine.graphs import Graphs

B = 16
ATTACKS = {
    "friendly": lambda **k: FriendlyPGD(steps=12, tau=1, eps=0.1, alpha=0.02, **k),
    "PGD+": lambda **k: PGDPlus(steps=12, restarts=2, eps=0.08, alpha=0.01, **k),
    "APGD": lambda **k: APGD(steps=25, eps=0.05, **k),
    "FAB": lambda **k: FAB(steps=10, eps=0.05, **k),
    "Square": lambda **k: Square(queries=60, eps=0.08, **k),
    "CW": lambda seed, **k: CW(searches=2, steps=6, lr=0.3, c=10.0, **k),
}


def problem():
    x = torch.rand(B, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model = RowLinear(48)
    return model, x, model(x).argmax(1)


def late(monkeypatch, lag):
    """Delay each count until it has been asked for `lag` times."""

    def sent(count):
        vain = iter(range(lag))
        return lambda: count if next(vain, None) is None else None

    monkeypatch.setattr(compact, "is_late", lambda x: True)
    monkeypatch.setattr(compact, "start_host_copy", sent)


@pytest.mark.parametrize("lag", [0, 1, 4, 1000])
@pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
def test_a_late_count_changes_no_result(make, lag, monkeypatch):
    model, x, y = problem()
    expected = make(seed=0, compact=False).perturb(x, y, model=model)
    late(monkeypatch, lag)
    found = make(seed=0, compact=True).perturb(x, y, model=model)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_a_late_count_saves_passes_in_few_sizes(monkeypatch):
    model, x, y = problem()
    late(monkeypatch, 1)
    seen = Recorded(model)
    FriendlyPGD(seen, steps=40, eps=0.1, alpha=0.005, seed=0, compact=True)(x, y)
    sizes = [len(v) for v in seen.inputs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == B and sizes[-1] < B
    assert all(n % (B // 8) == 0 for n in sizes)
    seen = Recorded(model)
    FriendlyPGD(seen, steps=40, eps=1.0, alpha=0.5, seed=0, compact=True)(x, y)
    assert len(seen.inputs) < 12  # all rows have left, and the count arrives a few steps later


def test_remaining(monkeypatch):
    active = torch.arange(20) < 13
    assert Remaining(active)(active) == 13
    late(monkeypatch, 1)
    remaining = Remaining(active)
    # 20 rows shrink by eighths, which are 3 rows here
    assert [remaining(active) for _ in range(4)] == [None, None, 15, None]
    assert remaining(active[:14]) == 14  # at most the rows in the batch
    assert torch.equal(first_active(active.flip(0), 14), torch.tensor([*range(7, 20), 0]))


def test_when_a_gpu_compacts():
    def asks(**settings):
        attack = FriendlyPGD(**settings)
        x = torch.empty(2, 4, device="meta")
        return may_compact(RowLinear(4), x, attack.settings, attack.graphs.mode)

    assert not asks(steps=10) and asks(steps=100)  # the short attack is recorded instead
    assert asks(steps=10, graph=False) and asks(steps=10, compact=True)
    assert not asks(steps=100, compact=False) and not asks(steps=100, graph=True)
    assert Graphs().mode == "auto"


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["friendly", "PGD+", "APGD"])
def test_nobody_waits_on_a_card(name):
    make = ATTACKS[name]
    model, x, y = problem()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    expected = make(seed=0, compact=False).perturb(x, y, model=model)
    attack = make(seed=0, compact=True)
    attack.perturb(x, y, model=model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = attack.perturb(x, y, model=model, draw=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(vars(found), vars(expected))
