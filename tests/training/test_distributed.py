"""Two processes train the same network as one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyadv
from pyadv.training import checkpoint

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
