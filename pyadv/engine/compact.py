"""Removal of released rows from the batch, so that they do not go through the network.

On the CPU the active rows are counted at every step. The host would have to wait for the count of a
GPU, which runs behind it. So the count is copied without blocking and read when it has arrived, a
few steps later. Released rows never return, so a late count is an upper bound: some released rows
stay in the batch a few steps longer, masked. The batch shrinks in eighths, because a GPU selects
kernels and allocates memory again for each size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyadv._host_copy import start_host_copy
from pyadv.engine.task import Settings
from pyadv.menus import Auto

_SHORT = 20  # steps up to which an attack on a GPU is recorded rather than compacted
_SIZES = 8


def may_compact(model: Callable[..., Any], x: Tensor, s: Settings, graph: Auto) -> bool:
    """Return whether a search may remove rows from the batch. `graph` is the mode of its
    recordings, which need a fixed size."""
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
    """A counter of active rows. A call at each step returns how many rows to continue with, or None
    while that number is not known."""

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
    """Return whether to shrink the batch from `now` to `size` rows.

    Each row removed saves a pass in all remaining steps, at the cost of copying the rows that stay.
    A pass of one row takes any network longer than copying two rows.
    """
    return 0 < size < now and 2 * (now - size) * steps_left >= size


def first_active(active: Tensor, size: int) -> Tensor:
    """Return the indices of the active rows in order, filled up to `size` with other rows.

    Unlike `nonzero` this does not wait for a GPU.
    """
    return active.byte().argsort(descending=True, stable=True)[:size]
