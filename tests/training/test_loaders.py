"""Loaders of one's own: one process continues an epoch exactly, several divide its batches."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

import pyadv
from pyadv.data.reading import IMAGE_KEYS, LABEL_KEYS
from pyadv.training.loaders import LoaderBatches, unpack

HERE = types.SimpleNamespace(device=torch.device("cpu"), num_processes=1)


class Noisy(Dataset):
    """20 samples with random augmentation; the label of a sample is its number."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        draws = torch.rand(()).item(), np.random.rand(), random.random()
        return torch.tensor([*draws]).view(3, 1, 1), i


class Shuffled(Sampler):
    """A sampler that draws from torch's generator and has none of its own."""

    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(20).tolist()


class Made:
    """An iterable of batches that is no DataLoader."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(20)
        for ids in order.split(4):
            yield torch.rand(4, 1, 1, 1), ids


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), 4),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0] * 20, 20)),
    "own sampler": lambda: DataLoader(Noisy(), 4, sampler=Shuffled()),
    "batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(range(20)), 4, False)
    ),
    "iterable": Made,
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("start", [1, 3])
def test_an_epoch_continues_exactly(name: str, start: int) -> None:
    """Order and augmentation depend on (seed, epoch, number) alone; no generator is touched."""
    torch.manual_seed(1)
    loader = LOADERS[name]()
    whole = list(LoaderBatches(loader, HERE, 7).epoch(2))
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    states = torch.get_rng_state(), random.getstate()
    batches = LoaderBatches(loader if start == 1 else LOADERS[name](), HERE, 7)
    rest = list(batches.epoch(2, start))
    assert len(rest) == 5 - start
    for (x, y, _), (their_x, their_y, _) in zip(rest, whole[start:], strict=True):
        assert torch.equal(y, their_y) and torch.equal(x, their_x)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    other = torch.cat([x for x, _, _ in batches.epoch(3)])
    assert not torch.equal(other, torch.cat([x for x, _, _ in whole]))
    if name == "shuffle":  # the loader is as it was
        assert loader.sampler.generator is None


def test_a_dict_has_the_keys_of_a_data_set() -> None:
    x, y = torch.rand(2, 3, 1, 1), torch.arange(2)
    for image in IMAGE_KEYS:
        for label in LABEL_KEYS:
            found = unpack({image: x, label: y}, "train")
            assert found[0] is x and found[1] is y and found[2] is None


PROCESSES = """
import json, os, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from pyadv.training.loaders import LoaderBatches

torch.set_num_threads(1)
here = Accelerator(cpu=True)
rank = here.process_index
samples = TensorDataset(torch.rand(32, 1, 2, 2), torch.arange(32))
refused = []
for loader in (
    [(torch.rand(4, 1, 2, 2), torch.arange(4))],
    DataLoader(samples, 4, sampler=DistributedSampler(samples)),
):
    try:
        LoaderBatches(loader, here, 0)
    except ValueError as error:
        refused.append(str(error))


shuffled = DataLoader(samples, 4, shuffle=True)


def labels(start):
    torch.manual_seed(rank + 10 * start)  # the order must not depend on it
    batches = LoaderBatches(shuffled, here, 0)
    return [y.tolist() for _, y, _ in batches.epoch(2, start)]


found = {"refused": refused, "whole": labels(0), "rest": labels(2)}
open(os.path.join(sys.argv[1], f"{rank}.json"), "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_divide_the_batches(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "PYTHONPATH": str(Path(pyadv.__file__).parents[1])}
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for one in found:
        rule = "train must be a DataLoader without a DistributedSampler"
        assert len(one["refused"]) == 2 and all(rule in message for message in one["refused"])
        assert one["rest"] == one["whole"][2:] and len(one["whole"]) == 4
    order = [y for one in found for batch in one["whole"] for y in batch]
    assert sorted(order) == list(range(32)) and order != sorted(order)
