"""Interrupted evaluations in random orders, sizes, duplicates and labels, against uninterrupted
ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyadv.attacks import PGD, AutoAttack
from pyadv.evaluation import Report, evaluate

CASES, CALLS, POOL, CLASSES = 8, 5, 12, 3
EPS = 0.1


class Killed(BaseException):
    """What interrupts a call."""


def model() -> nn.Module:
    """A network whose classes are near each other everywhere in the box."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CLASSES, bias=False))
    with torch.no_grad():
        net[0].bias.copy_(-net[0].weight.sum(1) / 2)
        net[2].weight.sub_(net[2].weight.mean(1, keepdim=True))
    return net.eval()


def attacks(kind: str) -> dict[str, PGD] | AutoAttack:
    settings = {"eps": EPS, "alpha": EPS / 3, "loss": "margin", "seed": 3}
    own = {"weak": PGD(steps=1, **settings), "strong": PGD(steps=4, restarts=2, **settings)}
    if kind == "all samples":
        return own
    return AutoAttack(None, eps=EPS, version="custom", attacks=own)


def call(
    net: nn.Module, x: Tensor, y: Tensor, kind: str, draw: random.Random, state: Path, kill: bool
) -> Report | None:
    """Evaluate with the state, as a tensor or in chunks; None if the call was interrupted."""
    left = draw.randrange(1, 12) if kill else -1

    def progress(*now: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    settings = {"eps": EPS, "attacks": attacks(kind), "batch_size": draw.choice([2, 5, 50])}
    settings |= {"state": state, "progress": progress}
    try:
        if draw.random() < 0.5:
            return evaluate(net, x, y, **settings)
        size = draw.randrange(1, len(y) + 1)
        batches = list(zip(x.split(size), y.split(size), strict=True))
        return evaluate(net, batches, chunk=draw.choice([1, 4, 100]), **settings)
    except Killed:
        return None


def verdicts(report: Report, x: Tensor) -> dict[str, Tensor]:
    found = report.findings
    rows, examples = found.examples()
    x_adv = x.clone()
    x_adv[rows] = examples if len(rows) else x_adv[rows]
    tables = {row.name: row.correct for row in report.rows}
    names = ("y", "prediction", "broken", "broken_by", "queries", "gradients", "done")
    return tables | {name: getattr(found, name) for name in names} | {"x_adv": x_adv}


@pytest.mark.parametrize("kind", ["all samples", "survivors"])
def test_any_history_of_a_state_gives_the_verdicts_of_none(tmp_path: Path, kind: str) -> None:
    net, finished, broken = model(), 0, 0
    for case in range(CASES):
        draw = random.Random(f"{kind} {case}")
        generator = torch.Generator().manual_seed(case)
        pool = torch.rand(POOL, 5, generator=generator)
        best = net(pool).argmax(1)
        for number in range(CALLS):
            rows = torch.tensor([draw.randrange(POOL) for _ in range(draw.randrange(1, 2 * POOL))])
            wrong = torch.tensor([draw.random() < 0.2 for _ in rows])
            x, y = pool[rows], torch.where(wrong, (best[rows] + 1) % CLASSES, best[rows])
            state = tmp_path / f"state {case}"
            report = call(net, x, y, kind, draw, state, kill=draw.random() < 0.6)
            if report is None:
                continue
            whole = evaluate(net, x, y, eps=EPS, attacks=attacks(kind), progress=None)
            assert report.n == len(y), (case, number)
            expected = verdicts(whole, x)
            for name, value in verdicts(report, x).items():
                assert torch.equal(value, expected[name]), (case, number, name)
            finished += 1
            broken += int((whole["clean"].correct & ~whole.worst.correct).sum())
    assert CASES < finished < CASES * CALLS and broken > CASES  # calls were interrupted, and told
