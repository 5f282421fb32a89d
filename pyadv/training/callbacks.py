"""Hooks of the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pyadv.training.trainer import Trainer


class Callback:
    """What a run calls as it trains. A subclass overrides the methods it needs.

    Every process of a distributed run calls them; `trainer.accelerator.is_main_process` tells which
    one may write files. A hook may read and change the trainer: `trainer.epoch` and `trainer.step`
    number the next step (epochs from 1, steps from 0), and `trainer.stop()` ends the run after the
    epoch.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Run before the first step, also of a resumed run."""

    def on_step(self, trainer: Trainer, loss: Tensor) -> None:
        """Run after each update of the weights, with the loss of the batch (on the device)."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Run after each epoch, before the checkpoint is written.

        `record` is its line of metrics.jsonl; numbers added to it, also of NumPy and as tensors
        without dimensions, are recorded and tracked.
        """

    def on_end(self, trainer: Trainer) -> None:
        """Run after the last epoch. A run that is interrupted or diverges does not get there."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this object: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
