"""Early stop and geometry values agree with a scripted table and with plain Python."""

from __future__ import annotations

import pytest
import torch
from inputs import generator

from pyadv import ops, reference


def start(rows, patience, device="cpu"):
    return (
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.ones(rows, dtype=torch.bool, device=device),
        torch.full((rows,), patience, device=device),
    )


# Whether each of five iterates is correct (1), and for patience 0, 1, 2 and 5: kappa, and the
# number of iterates after which the row is still active.
SCRIPTS = {
    "never fooled": ((1, 1, 1, 1, 1), {0: (5, 5), 1: (5, 5), 2: (5, 5), 5: (5, 5)}),
    "fooled at once": ((0, 0, 0, 0, 0), {0: (0, 0), 1: (0, 1), 2: (0, 2), 5: (0, 5)}),
    "fooled late": ((1, 1, 0, 0, 0), {0: (2, 2), 1: (2, 3), 2: (2, 4), 5: (2, 5)}),
    "flips back": ((1, 0, 1, 0, 1), {0: (1, 1), 1: (2, 3), 2: (3, 5), 5: (3, 5)}),
    "flips back at once": ((0, 1, 1, 0, 0), {0: (0, 0), 1: (2, 3), 2: (2, 4), 5: (2, 5)}),
}


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
def test_scripted_sequences(patience, device):
    kappa, active, left = start(len(SCRIPTS), patience, device)
    stays = torch.zeros_like(kappa)
    for step in range(5):
        correct = torch.tensor([bool(s[step]) for s, _ in SCRIPTS.values()], device=device)
        ops.track(correct, kappa, active, left)
        stays += active
    expected = [table[patience] for _, table in SCRIPTS.values()]
    assert list(zip(kappa.tolist(), stays.tolist(), strict=True)) == expected


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 300])
def test_equals_reference_and_a_loop(rows, device):
    g = generator()
    states = [start(rows, 0, device) for _ in range(2)]
    patience = torch.randint(0, 4, (rows,), generator=g)
    for _, _, left in states:
        left.copy_(patience)
    by_hand = [[0, True, int(p)] for p in patience]
    for _ in range(8):
        correct = torch.rand(rows, generator=g) < 0.5
        for state, op in zip(states, (ops.track, reference.track), strict=True):
            op(correct.to(device), *state)
        for row, c in zip(by_hand, correct.tolist(), strict=True):
            if row[1] and c:
                row[0] += 1
            elif row[1] and row[2] == 0:
                row[1] = False
            elif row[1]:
                row[2] -= 1
        for state in states:
            assert [list(r) for r in zip(*(t.tolist() for t in state), strict=True)] == by_hand


def test_tensors_with_gaps(device):
    rows = 9
    correct = torch.arange(2 * rows, device=device)[::2] % 4 == 0
    dense = start(rows, 1, device)
    gaps = tuple(torch.stack([t, t], dim=1)[:, 0] for t in start(rows, 1, device))
    for _ in range(3):
        ops.track(correct, *dense)
        ops.track(torch.stack([~correct, correct], dim=1)[:, 1], *gaps)
    for a, b in zip(dense, gaps, strict=True):
        assert torch.equal(a, b)


def test_versions_change_and_inference_mode_works(device):
    state = start(3, 1, device)
    versions = [t._version for t in state]
    correct = torch.tensor([True, False, True], device=device)
    ops.track(correct, *state)
    assert all(t._version > v for t, v in zip(state, versions, strict=True))
    with torch.inference_mode():
        fresh = start(3, 1, device)
        ops.track(correct, *fresh)
        ops.track(correct, *state)
    assert fresh[0].tolist() == [1, 0, 1] and state[0].tolist() == [2, 0, 2]


def test_well_formed_op(device):
    for rows in (0, 4):
        correct = torch.arange(rows, device=device) % 2 == 0
        torch.library.opcheck(torch.ops.pyadv.track.default, (correct, *start(rows, 1, device)))


def test_refuses_bad_arguments(device):
    correct = torch.ones(3, dtype=torch.bool, device=device)
    kappa, active, patience = start(3, 1, device)
    for error, message, args in (
        (TypeError, "correct must be a torch.bool", (kappa, kappa, active, patience)),
        (TypeError, "kappa must be a torch.int64", (correct, kappa.int(), active, patience)),
        (TypeError, "active must be a torch.bool", (correct, kappa, kappa, patience)),
        (ValueError, r"patience must have shape \[3\]", (correct, kappa, active, patience[:2])),
        (ValueError, "correct must have shape", (correct[:, None], kappa, active, patience)),
        (ValueError, "kappa shares memory", (correct, kappa, active, kappa)),
        (ValueError, "active shares memory", (active, kappa, active, patience)),
        (
            ValueError,
            "patience must have its own memory",
            (correct, kappa, active, patience[:1].expand(3)),
        ),
    ):
        with pytest.raises(error, match=f"track: {message}"):
            ops.track(*args)
