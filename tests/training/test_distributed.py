"""Two processes train the same network as one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyadv
from pyadv.data import ImageData
from pyadv.training import Config, Trainer, checkpoint

SCRIPT = """
import sys, dataclasses, torch
from pyadv import training
from pyadv.data import load
torch.set_num_threads(1)
full = load()
data = dataclasses.replace(full, train_x=full.train_x[:100], train_y=full.train_y[:100],
                           test_x=full.test_x[:20], test_y=full.test_y[:20])
config = training.Config(epochs=2, batch_size=32, steps=2, emr=0.01)
quiet = training.Display(quiet=True)
training.train(config, sys.argv[1], data=data, device="cpu", display=quiet)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": str(Path(pyadv.__file__).parents[1])}
    for command, folder in (([sys.executable], "one"), (launch, "two")):
        command = [*command, str(script), str(tmp_path / folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("one", "two"))
    a, b = one["records"][-1], two["records"][-1]
    assert sum(a["kappa"]) == sum(b["kappa"]) == 100
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=0, atol=1e-4)


FSDP = """
import sys, dataclasses, torch
from torch import nn
from pyadv import training
from pyadv.data import load
torch.set_num_threads(1)
full = load()
data = dataclasses.replace(full, train_x=full.train_x[:40], train_y=full.train_y[:40],
                           test_x=full.test_x[:8], test_y=full.test_y[:8])
parts = {"data": data, "device": "cpu", "display": training.Display(quiet=True)}


def network():
    torch.manual_seed(3)
    block = nn.Sequential(nn.Conv2d(1, 5, 7, 7), nn.BatchNorm2d(5), nn.ReLU())
    return nn.Sequential(block, nn.Flatten(), nn.Linear(80, 16), nn.ReLU(), nn.Linear(16, 10))


def without_statistics():
    net = network()
    net[0][1] = nn.Identity()  # batch statistics are those of a process
    return net


def main(mode, *folders):
    for folder in folders:
        name = folder.rpartition("-")[2]
        if name == "resumed":
            training.resume(folder, model=without_statistics(), epochs=3, **parts)
            continue
        method = {"fat": {"method": "fat", "tau": 0}, "emr": {"emr": 10}}.get(name, {})
        config = training.Config(epochs=2, batch_size=16, steps=2, eps=0.1, lr=0.05, clip=1.0,
                                 val=4, fsdp=mode == "fsdp", **method)
        net = network() if name == "fat" else without_statistics()
        training.train(config, folder, model=net, **parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_sharded_network_trains_like_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that share the weights train as one does, and each resumes the other's run."""
    monkeypatch.chdir(tmp_path)
    here: dict[str, Any] = {"__name__": "one_process"}
    exec(FSDP, here)
    here["main"]("whole", "one-at", "one-emr")

    shutil.copytree("one-at", "two-resumed")
    saved = checkpoint.load(Path("two-resumed/checkpoint.pt"))
    saved["config"]["fsdp"] = True
    checkpoint.save(Path("two-resumed/checkpoint.pt"), saved)
    Path("script.py").write_text(FSDP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "script.py", "fsdp", "two-at", "two-emr", "two-fat", "two-resumed"]
    env = {**os.environ, "PYTHONPATH": str(Path(pyadv.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    shutil.copytree("two-at", "one-resumed")
    here["main"]("whole", "one-resumed")

    states = {
        folder.name: checkpoint.load(folder / "checkpoint.pt") for folder in Path().glob("*-*")
    }
    for name, epochs in (("at", 2), ("emr", 2), ("resumed", 3)):
        one, two = states[f"one-{name}"], states[f"two-{name}"]
        assert one["epoch"] == two["epoch"] == epochs + 1
        for key, weight in one["model"].items():
            assert type(two["model"][key]) is torch.Tensor
            torch.testing.assert_close(two["model"][key], weight, rtol=0, atol=1e-5)
        for i, kept in one["optimizer"]["state"].items():
            theirs = two["optimizer"]["state"][i]["momentum_buffer"]
            torch.testing.assert_close(theirs, kept["momentum_buffer"], rtol=0, atol=1e-4)
        assert one["records"][-1]["val_robust"] == two["records"][-1]["val_robust"]
    assert states["two-fat"]["epoch"] == 3  # an attack that ended early would stop the others
    at, emr, resumed = (states[f"one-{n}"]["model"]["0.0.weight"] for n in ("at", "emr", "resumed"))
    for other in (emr, resumed):
        assert (at - other).abs().max() > 1e-4  # what differs does so beyond the tolerance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 0.9}, "fsdp does not go with ema, got ema=0.9"),
        ({"accumulate": 2}, "fsdp does not go with accumulate, got accumulate=2"),
        ({"precision": "fp16"}, "fsdp needs precision fp32 or bf16, got fp16"),
    ],
)
def test_settings_that_need_whole_weights(
    small: ImageData, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Config(fsdp=True, **settings).resolve(small)


def test_sharding_needs_a_function_that_makes_the_optimizer(small: ImageData) -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizer must be a function of the parameters"):
        Trainer(Config(fsdp=True), small, model=net, optimizer=optimizer, device="cpu")
