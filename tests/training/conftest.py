"""Small data sets to train on in a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from pyadv.data import ImageData, load


@pytest.fixture(scope="session")
def subset() -> Callable[[int, int], ImageData]:
    """Return a function that cuts the embedded set to its first training and test images."""
    full = load()

    def first(train: int, test: int) -> ImageData:
        return dataclasses.replace(
            full,
            train_x=full.train_x[:train],
            train_y=full.train_y[:train],
            test_x=full.test_x[:test],
            test_y=full.test_y[:test],
        )

    return first


@pytest.fixture(scope="session")
def small(subset: Callable[[int, int], ImageData]) -> ImageData:
    """Return a data set small enough to train on in a test."""
    return subset(100, 40)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Reset the state that Accelerate keeps per process: precisions differ between runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)
