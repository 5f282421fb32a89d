"""Two processes compute the gradient that one process computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective_parts import attack, gradients, make_batch, make_net

from pyadv.objectives import AWP, EMR, GAIRAT, GAIRRST, MAIL, TRADES, Standard

OBJECTIVES = {
    "gairat": lambda: GAIRAT(attack()),
    "mail-mart": lambda: MAIL(attack(), "mart", margin="dif"),
    "mail-awp": lambda: AWP(MAIL(attack()), gamma=0.05),
    "trades+emr": lambda: TRADES(attack(loss="kl")) + EMR(0.5),
    "emr difference": lambda: Standard() + EMR(0.5, derivative="difference"),
    "emr official": lambda: Standard() + EMR(12.0, reduction="official"),
    "gair-rst": lambda: GAIRRST(attack(loss="kl"), attack(loss="margin"), lam=-1.0),
}

SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
DDP = DistributedDataParallel
from objective_parts import gradients, make_batch, make_net
from objectives.test_distributed import OBJECTIVES, shares
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, (x, y) = dist.get_rank(), make_batch()
results = {}
for name, make in OBJECTIVES.items():
    for uneven in (False, True) if name == "mail-awp" or name == "gairat" else (False,):
        net = make_net().double().eval()
        part = shares(uneven)[rank]
        ddp = DistributedDataParallel(net)
        loss = make()(ddp, x[part].double(), y[part])
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        results[name, uneven] = total / 2, [p.grad for p in net.parameters()]
class Training(torch.nn.Module):  # as Lightning wraps a module: from outside
    def __init__(self, objective, net):
        super().__init__()
        self.objective, self.net = objective, net

    def forward(self, x, y):
        return self.objective(self.net, x, y)


mine = x[shares(False)[rank]].double(), y[shares(False)[rank]]
for name, wrap, settings in (
    ("compiled", lambda net: torch.compile(DDP(net), backend="eager"), {}),
    ("inside", lambda net: torch.nn.Sequential(DDP(net)), {}),
    ("lightning", None, {}),
    ("given", DDP, {"group": dist.group.WORLD}),
):
    net, objective = make_net().double().eval(), OBJECTIVES["mail-mart"]()
    if wrap is None:
        model = DDP(Training(objective, net))
        loss = model(*mine)
    else:
        model = wrap(net)
        loss = objective(model, *mine, **settings)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    results["mail-mart", name] = total / 2, [p.grad for p in net.parameters()]
for name in ("mail-mart", "gairat", "emr difference", "trades+emr"):
    net, objective = make_net().double().eval(), OBJECTIVES[name]()
    try:
        loss = objective(fully_shard(net), *mine)
    except ValueError as error:
        assert name == "trades+emr" and 'must be "difference"' in str(error), error
        continue
    assert name != "trades+emr"
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    results[name, "fully sharded"] = total / 2, [p.grad.full_tensor() for p in net.parameters()]
net = make_net().double().eval()
one = OBJECTIVES["mail-mart"]()
one(net, *mine, group=False)
assert abs(one.last["weights"].mean() - 1) < 1e-9  # for each process by itself
halves = make_batch()[0].double().split([7, 5, 12]), make_batch()[1].split([7, 5, 12])
for name in ("mail-mart", "emr official"):
    net = make_net().double().eval()
    ddp = DistributedDataParallel(net)
    mine = [(halves[0][i], halves[1][i]) for i in ((0, 1), (2,))[rank]]
    parts = OBJECTIVES[name]().prepare(ddp, mine)
    for i in range(len(parts)):
        with ddp.no_sync():
            parts.loss(i).backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    results[name, "micro"] = None, [p.grad for p in net.parameters()]
if rank == 0:
    torch.save(results, sys.argv[1])
dist.destroy_process_group()
"""


def shares(uneven: bool) -> list[slice]:
    cut = 15 if uneven else 12
    return [slice(0, cut), slice(cut, 24)]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent.parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(script), str(out), str(tests), str(tests.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    x, y = make_batch()
    for (name, case), (loss, grads) in torch.load(out).items():
        net = make_net().double().eval()
        expected = OBJECTIVES[name]()(net, x.double(), y)
        if case != "micro":
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-9)
        for a, b in zip(grads, gradients(net, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8, msg=f"{name}, {case}")
