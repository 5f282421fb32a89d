"""The metrics of a run, one record per epoch: metrics.jsonl and TensorBoard curves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyadv import _state

_CURVES = ("lr", "loss", "train_clean", "train_robust", "val_clean", "val_robust")


class Records:
    """A sequence of dicts, written to `folder`/metrics.jsonl and, where TensorBoard is installed,
    to `folder`/tensorboard.

    Args:
        folder: the run folder.
        active: whether this process writes the files; one process of a distributed run does.
    """

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.folder, self.path, self.active = folder, folder / "metrics.jsonl", active
        self.items: list[dict[str, Any]] = []
        self._board: Any = None  # opened with the first record, since opening it makes its folder

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and write it to the files."""
        self.items.append(record)
        if self.active:
            self._write()
            self._draw(record)

    def restore(self, items: list[dict[str, Any]]) -> None:
        """Take the records of a checkpoint; the file loses the lines of later epochs."""
        self.items = list(items)
        if self.active:
            self._write()

    def is_best(self, record: dict[str, Any]) -> bool:
        """Return whether `record` is more robust on held-out data than every record so far."""
        value = record["val_robust"]
        return value is not None and all(value > item["val_robust"] for item in self.items)

    def _write(self) -> None:
        lines = "".join(json.dumps(item) + "\n" for item in self.items)
        _state.write(self.path, lambda file: file.write(lines.encode()))

    def _draw(self, record: dict[str, Any]) -> None:
        self._board = self._board or _open_board(self.folder / "tensorboard")
        if self._board:
            for name in _CURVES:
                if record[name] is not None:
                    self._board.add_scalar(name, record[name], record["epoch"])
            self._board.flush()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # TensorBoard is optional: metrics.jsonl has the same numbers
        return None
    return SummaryWriter(folder)
