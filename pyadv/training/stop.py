"""Stopping a run where its state is whole."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a question asked between steps, where the state is
    whole; the second one does what it always did."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        try:
            self.previous = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            self.previous = {}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def requested(self) -> bool:
        """Whether any process got a signal: they all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0
