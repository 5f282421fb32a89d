"""The accumulator of robust accuracy, with torchmetrics and without."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys

import pytest
import torch
from objective_parts import make_batch, make_net
from torch import nn

import pyadv
from pyadv.attacks import FMN, PGD


@pytest.fixture(params=["plain", "torchmetrics"])
def kind(request, monkeypatch):
    """The class RobustAccuracy, on either base."""
    name = "pyadv.integrations.metrics"
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
    else:
        pytest.importorskip("torchmetrics")
    sys.modules.pop(name, None)
    yield importlib.import_module(name).RobustAccuracy
    sys.modules.pop(name, None)


def attack(**settings):
    return PGD(**{"eps": 0.05, "alpha": 0.02, "steps": 5, "seed": 0, **settings})


def test_the_same_as_an_evaluation(kind):
    net, (x, y) = make_net().eval(), make_batch(30)
    expected = pyadv.evaluate(net, x, y, eps=0.05, attacks={"pgd": attack()}, progress=None)
    metric = kind(attack())
    values = []
    for part in torch.arange(30).split(8):
        values.append(metric(net, x[part], y[part]))
    assert metric.compute().item() == pytest.approx(expected.worst.accuracy)
    assert metric.clean_accuracy.item() == pytest.approx(expected["clean"].accuracy)
    sizes = torch.tensor([8, 8, 8, 6])
    assert (torch.stack(values) * sizes).sum() / 30 == pytest.approx(expected.worst.accuracy)
    other = kind(attack())
    order = torch.randperm(30)
    other.update(net, x[order], y[order])
    assert other.compute() == metric.compute()
    metric.reset()
    metric.update(net, x[:4], (y[:4] + 1) % 4)
    assert metric.total == 4


def test_modes_and_copies(kind):
    net, (x, y) = make_net().train(), make_batch(8)
    metric = kind(attack())
    metric.update(net, x, y)
    assert all(m.training for m in net.modules()) and isinstance(metric, nn.Module)
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(kind(attack())))):
        twin.update(net, x, y)
    assert copy.deepcopy(metric).compute() == metric.compute()
    assert metric.to("cpu").total == 8


def test_minimum_norm_attacks_and_refusals(kind):
    net, (x, y) = make_net().eval(), make_batch(8)
    metric = kind(FMN(norm="Linf", eps=0.1, steps=10))
    metric.update(net, x, y)
    assert 0 <= metric.compute() <= 1
    with pytest.raises(ValueError, match="untargeted"):
        kind(attack(targeted=True))


def _count_on(rank, port, path):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    sys.modules["torchmetrics"] = None
    from pyadv.integrations.metrics import RobustAccuracy

    net, (x, y) = make_net().eval(), make_batch(10)
    metric = RobustAccuracy(attack())
    part = slice(0, 4) if rank == 0 else slice(4, 10)
    metric.update(net, x[part], y[part])
    torch.save(metric.compute(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_are_summed(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_count_on, (port, str(tmp_path)), nprocs=2)
    net, (x, y) = make_net().eval(), make_batch(10)
    clean = net(x).argmax(1) == y
    expected = (clean & attack().run(x, y, draw=0, model=net).correct).float().mean()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected.item())
