"""Which rows stay in the batch: a sample that has left an attack need not go through the network.

On the CPU the rows still attacked are counted at every step. A GPU runs behind the host, which
would have to wait for it; there the count is copied without blocking and read when it has arrived,
a few steps later. Rows never come back, so a late count is an upper bound: some released rows stay
in the batch a little longer, masked. Sizes shrink in eighths of the batch, because a GPU chooses
kernels and memory anew for each size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyadv._host_copy import start_host_copy
from pyadv.engine.task import Settings

_SHORT = 20  # steps up to which an attack on a GPU is recorded rather than compacted
_SIZES = 8


def may_compact(model: Callable[..., Any], x: Tensor, s: Settings, graph: bool | str) -> bool:
    """Return whether a search may drop rows from the batch. `graph` is the mode of its recordings,
    which have a fixed size."""
    if s.bn != "eval":
        if s.compact is True:
            raise ValueError('compact=True needs bn="eval": batch statistics need the whole batch')
        return False
    if s.compact != "auto":
        return s.compact
    if hasattr(model, "_orig_mod"):  # a compiled model compiles again for new shapes
        return False
    recorded = graph is True or (graph == "auto" and s.steps <= _SHORT)
    return x.is_cpu or not recorded


class Remaining:
    """A counter of active rows. Called at every step, it returns how many rows to carry on with, or
    None while that is not known."""

    def __init__(self, x: Tensor):
        self._late = is_late(x)
        self._part = max(-(-len(x) // _SIZES), 1)
        self._arrived: Callable[[], Tensor | None] | None = None

    def __call__(self, active: Tensor) -> int | None:
        if not self._late:
            return int(active.sum())
        size = None
        if self._arrived is not None:
            count = self._arrived()
            if count is None:
                return None
            size = min(-(-int(count) // self._part) * self._part, len(active))
        self._arrived = start_host_copy(active.sum())
        return size


def is_late(x: Tensor) -> bool:
    """Return whether reading a count of x's device would make the host wait."""
    return not x.is_cpu


def worth_compacting(size: int, now: int, steps_left: int) -> bool:
    """Return whether to shrink the batch from `now` to `size` rows. A row less saves a pass in all
    steps to come, and the copy of the rows that stay costs; any network takes longer for one row
    than the copy of two."""
    return 0 < size < now and 2 * (now - size) * steps_left >= size


def first_active(active: Tensor, size: int) -> Tensor:
    """Return the places of the active rows in their order, filled up to `size` with others, without
    waiting for a GPU, which `nonzero` does."""
    return active.byte().argsort(descending=True, stable=True)[:size]
