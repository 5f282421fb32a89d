"""The metrics of a run, one record per epoch: metrics.jsonl and the trackers of Accelerate."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from pyadv import _state
from pyadv._names import did_you_mean

_NOT_TRACKED = ("epoch", "seconds")


def trackers(log_with: str | None, folder: Path | None) -> list[str]:
    """Return the names of the trackers in the setting `log_with`.

    Raises:
        ValueError: for a tracker that Accelerate does not know, and without a folder to write to.
        ImportError: for one that is not installed.
    """
    if log_with is None:  # TensorBoard is optional: metrics.jsonl has the same numbers
        return ["tensorboard"] if folder is not None and _has_tensorboard() else []
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    names = [name.strip() for name in log_with.split(",") if name.strip() not in ("", "none")]
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            meant = did_you_mean(name, (*known, "none"))
            raise ValueError(f"log_with must be none or of {', '.join(known)}, got {name!r}{meant}")
        if name not in installed or (name == "tensorboard" and not _has_tensorboard()):
            raise ImportError(f"log_with {name!r} is not installed: pip install {name}")
    if names and folder is None:
        raise ValueError(f"log_with {log_with!r} needs a run folder")
    return names


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


class Records:
    """A sequence of dicts, written to `folder`/metrics.jsonl and to the trackers of Accelerate.

    Args:
        folder: the run folder; None writes nothing.
        accelerator: has the trackers. One process of a distributed run writes the file.
        settings: of the run, for the trackers.
    """

    def __init__(
        self, folder: Path | None, accelerator: Accelerator, settings: dict[str, Any]
    ) -> None:
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.accelerator, self.settings = accelerator, settings
        self.items: list[dict[str, Any]] = []
        self._begun = False  # trackers begin with the first record, since they make their folders

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, write it to the file and log it.

        Numbers of NumPy and tensors without dimensions become Python's numbers.

        Raises:
            ValueError: if JSON cannot hold a value.
        """
        record = {name: _plain(name, value) for name, value in record.items()}
        self.items.append(record)
        self._write()
        self._log(record)

    def restore(self, items: list[dict[str, Any]]) -> None:
        """Take the records of a checkpoint; the file loses the lines of later epochs."""
        self.items = list(items)
        self._write()

    def is_best(self, record: dict[str, Any]) -> bool:
        """Return whether `record` is more robust on held-out data than every record so far."""
        value = record["val_robust"]
        return value is not None and all(value > item["val_robust"] for item in self.items)

    def finish(self) -> None:
        """Close the trackers."""
        if self._begun:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers, self._begun = [], False

    def _write(self) -> None:
        if self.path is not None and self.accelerator.is_main_process:
            lines = "".join(json.dumps(item) + "\n" for item in self.items)
            _state.write(self.path, lambda file: file.write(lines.encode()))

    def _log(self, record: dict[str, Any]) -> None:
        if not self.accelerator.log_with:
            return
        if not self._begun:
            given = {k: v for k, v in self.settings.items() if v is not None}
            plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in given.items()}
            self.accelerator.init_trackers("pyadv", config=plain)
            self._begun = True
        values = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name not in _NOT_TRACKED
        }
        self.accelerator.log(values, step=record["epoch"])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


def _plain(name: str, value: Any) -> Any:
    """Return a value of a record as it reads back from metrics.jsonl."""
    try:
        return json.loads(json.dumps(value, default=_number))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record[{name!r}] must be a number, a text or a list of them: {error}"
        ) from None


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | Tensor) and value.ndim == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__} is none")
