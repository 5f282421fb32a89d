"""A small evaluation, and what each of two processes runs of it.

`main(part, rank, folder)` writes what each case found, or its error, to folder/PART-RANK.pt.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pyadv.attacks import FAB, AutoAttack, DeepFool, autoattack, ensemble
from pyadv.attacks.processes import together
from pyadv.compat.autoattack import AutoAttack as OfficialAutoAttack
from pyadv.evaluation import Bisection, evaluate, margins, run_suite

EPS = 0.08
SETTINGS = {"eps": EPS, "progress": None, "batch_size": 4}


class Net(nn.Module):
    """A network whose logits for a sample are the same bits in every batch: no matrix products."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(12, 16, generator=generator) / 4)
        self.second = nn.Parameter(torch.randn(4, 12, generator=generator) / 3)
        self.register_buffer("shift", torch.zeros(16))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("this card is broken")
        hidden = ((x.flatten(1) - self.shift)[:, None] * self.first).sum(2).relu()
        return (hidden[:, None] * self.second).sum(2)


def samples(n: int = 13) -> tuple[Tensor, Tensor]:
    """Return samples, of which two are equal and one is misclassified."""
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    x[-1:] = x[:1]
    y = Net()(x).argmax(1)
    y[2:3] = (y[2:3] + 1) % 4
    return x, y


def plan(version: str, norm: str) -> dict[str, autoattack.Member]:
    """Return AutoAttack's members with few steps."""
    members = autoattack_plan(version, norm)
    for name, member in members.items():
        member.steps, member.targets = (20 if name == "square" else 4), 3
    return members


def margin_attacks(norm: str, **settings: Any) -> dict[str, Any]:
    settings.pop("seed")
    return {
        "DeepFool": DeepFool(norm=norm, steps=5, **settings),
        "FAB": FAB(norm=norm, steps=5, seed=0, **settings),
        "bisection": Bisection(norm=norm, rounds=3, seed=0, **settings),
    }


autoattack_plan = autoattack.plan
few_steps = (
    mock.patch.multiple(autoattack, plan=plan),
    mock.patch.object(margins, "margin_attacks", margin_attacks),
)


def of_report(report: Any) -> dict[str, Any]:
    """Return everything that a report holds."""
    found = report.findings
    tables = {name: getattr(found, name) for name in found._TABLES}
    return tables | {"summary": report.to_dict(), "examples": found.examples()}


def of_document(document: Any) -> dict[str, Any]:
    """Return everything that a document holds."""
    values = {name: of_report(report) for name, report in document.reports.items()}
    return values | {"summary": document.to_dict(), "margins": vars(document.margins)}


def pgd20(state: Path | None = None, **settings: Any) -> dict[str, Any]:
    x, y = samples()
    return of_report(evaluate(Net(), x, y, **{**SETTINGS, "state": state, **settings}))


def auto_attack(state: Path | None = None, progress: Any = None, n: int = 13) -> dict[str, Any]:
    x, y = samples(n)
    attack = AutoAttack(Net(), eps=EPS, seed=0, progress=progress)
    return vars(attack.run(x, y, batch_size=4, state=state))


def suite() -> dict[str, Any]:
    x, y = samples()
    return of_document(
        run_suite("all", Net(), x, y, surrogate=Net(1), **SETTINGS | {"batch_size": 16})
    )


def batches() -> dict[str, Any]:
    x, y = samples()
    pairs = zip(x.split(3), y.split(3), strict=True)
    return of_report(evaluate(Net(), pairs, chunk=6, **SETTINGS))


CASES: dict[str, Callable[[], Any]] = {
    "pgd20": pgd20,
    "autoattack": auto_attack,
    "one sample": lambda: auto_attack(n=1),
    "suite": suite,
    "batches": batches,
}


# --- Cases in which the processes differ.


def other_samples(rank: int) -> Any:
    x, y = samples()
    return pgd20() if rank else of_report(evaluate(Net(), x[1:], y[1:], **SETTINGS))


def other_weights(rank: int) -> Any:
    return evaluate(Net(rank), *samples(), **SETTINGS)


def other_radius(rank: int) -> Any:
    return evaluate(Net(), *samples(), **{**SETTINGS, "eps": EPS + rank / 100})


def bad_argument(rank: int) -> Any:
    return evaluate(Net(), *samples(), **{**SETTINGS, "attacks": "pgd2" if rank else "pgd20"})


def failing_model(rank: int) -> Any:
    net = Net()
    net.fails = bool(rank)
    return evaluate(net, *samples(), **SETTINGS)


def interrupted(rank: int) -> Any:
    def stop(*now: object) -> None:
        if rank:
            raise KeyboardInterrupt

    return evaluate(Net(), *samples(), **{**SETTINGS, "progress": stop})


def interrupted_between(rank: int) -> Any:
    """An interruption that comes while a process waits in the first of two exchanges."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with together(Net()) as processes:
        if rank:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(1)
        return processes.first("what process 0 has")


def fewer_batches(rank: int) -> Any:
    x, y = samples(9)
    pairs = list(zip(x.split(3), y.split(3), strict=True))
    return evaluate(Net(), pairs[: 3 - rank], chunk=3, **SETTINGS)


def shards(rank: int) -> Any:
    """A script that gives each process its part, as scripts for the authors' package do."""
    x, y = samples()
    attack = OfficialAutoAttack(Net(), eps=EPS, seed=0, verbose=False, version="custom")
    attack.attacks_to_run = ["apgd-ce"]
    attack.apgd.n_iter = 2
    return attack.run_standard_evaluation(x[rank::2], y[rank::2], bs=4)


def by_itself(rank: int) -> Any:
    x, y = samples()
    return of_report(evaluate(Net(rank), x[rank:], y[rank:], group=False, **SETTINGS))


def other_buffers(rank: int) -> Any:
    net = Net()
    net.shift += 0.3 * rank
    found = of_report(evaluate(net, *samples(), **SETTINGS))
    assert net.shift[0] == torch.tensor(0.3) * rank
    return found


def sharded(rank: int) -> Any:
    net = Net()
    fully_shard(net)
    with together(net) as processes:
        assert processes.alone
    return evaluate(net, *samples(), group=dist.group.WORLD, **SETTINGS)


DIFFERENT = (other_samples, other_weights, other_radius, bad_argument, failing_model)
DIFFERENT += (interrupted, interrupted_between, fewer_batches, shards, by_itself, other_buffers)
DIFFERENT += (sharded,)


def die(after: int) -> Callable[..., None]:
    """Return a progress that ends the process at a call."""
    calls: list[Any] = []

    def progress(*now: object) -> None:
        calls.append(now)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def kill(state: Path, rank: int, victim: int, after: int) -> Any:
    with mock.patch.object(ensemble, "_SAVE_EVERY", 0.0):  # save after every batch
        return auto_attack(state, die(after) if rank == victim else None)


def run_part(part: str, rank: int, folder: Path) -> dict[str, Any]:
    if part == "first":
        cases = dict(CASES) | {c.__name__: (lambda c=c: c(rank)) for c in DIFFERENT}
        cases["killed"] = lambda: kill(folder / "killed.state", rank, victim=1, after=4)
    else:
        cases = {
            "from one": lambda: auto_attack(folder / "one.state"),
            "from two": lambda: auto_attack(folder / "two.state"),
            "killed again": lambda: kill(folder / "again.state", rank, victim=0, after=1),
        }
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except (Exception, KeyboardInterrupt) as error:
            results[name] = f"{type(error).__name__}: {error}"
        torch.save(results, folder / f"{part}-{rank}.pt")
    return results


def main(part: str, rank: int, folder: Path) -> None:
    """Run a part as one of two processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/{part}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with few_steps[0], few_steps[1]:
        run_part(part, rank, folder)
