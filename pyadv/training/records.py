"""The metrics of a run, one record per epoch: metrics.jsonl and TensorBoard curves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CURVES = ("lr", "loss", "train_clean", "train_robust", "val_clean", "val_robust")


class Records:
    """A sequence of dicts that is also `folder`/metrics.jsonl and, where TensorBoard is installed,
    `folder`/tensorboard. Only an `active` one writes files (one process does)."""

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.path, self.active = folder / "metrics.jsonl", active
        self.items: list[dict[str, Any]] = []
        self.board = _board(folder / "tensorboard") if active else None

    def append(self, record: dict[str, Any]) -> None:
        self.items.append(record)
        if self.active:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board:
            for name in _CURVES:
                if record[name] is not None:
                    self.board.add_scalar(name, record[name], record["epoch"])
            self.board.flush()

    def restore(self, items: list[dict[str, Any]]) -> None:
        """Take the records of a checkpoint; lines of epochs after it leave the file."""
        self.items = list(items)
        if self.active:
            self.path.write_text("".join(json.dumps(item) + "\n" for item in items))

    def is_best(self, record: dict[str, Any]) -> bool:
        """Whether `record` is more robust on held-out data than every record so far."""
        value = record["val_robust"]
        return value is not None and all(value > item["val_robust"] for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra: metrics.jsonl has the same numbers
        return None
    return SummaryWriter(folder)
