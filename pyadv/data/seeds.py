"""Derive seeds from keys such as (seed, epoch), and seed the host's generators for a while."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def mixed(*key: int) -> int:
    """Return 32 bits that depend on every number of `key`.

    torch's CPU generator uses only 32 bits of its seed.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators of torch (CPU), NumPy and Python, and give them their states back."""
    words = np.random.SeedSequence(key).generate_state(3)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(words[0]))
    np.random.seed(words[1])
    random.seed(int(words[2]))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
