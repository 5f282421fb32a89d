"""Non-blocking device-to-host copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def start_host_copy(t: Tensor) -> Callable[[], Tensor | None]:
    """Start to copy `t` to the host and return a function that gives the copy once it has arrived,
    and None before. A tensor on the CPU is returned at once."""
    if t.is_cpu:
        return lambda: t
    there = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    there.copy_(t.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(t.device))
    return lambda: there if event.query() else None
