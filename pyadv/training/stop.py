"""Stop a run between two steps, where its state is complete."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """Context manager that notes the first SIGINT or SIGTERM, for the loop to ask about between
    steps. The second signal has its usual effect.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            self.previous = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        except ValueError:  # only the main thread can handle signals
            self.previous = {}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def requested(self) -> bool:
        """Return whether any process got a signal; all processes then stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0
