"""Files that hold the state of long work: written whole or not at all, read without running
code."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DiskFull(OSError):
    """A file does not fit: the disk, the user's quota or the limit on file sizes is exhausted."""

    def __str__(self) -> str:
        return self.strerror or ""


def write(path: Path, fill: Callable[[Any], None]) -> None:
    """Write the file `path` with `fill(file)`, whole or not at all.

    A reader finds the old file or the new one, never a part, wherever the process dies. A write
    that fails removes its part and leaves the old file as it was.

    Args:
        path: the file; its folder must exist.
        fill: calls `file.write` with bytes.

    Raises:
        DiskFull: if there is no room for the file; the message says how large it is.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", buffering=0) as raw:
            file = _Counted(raw)
            fill(file)
            try:
                if file.error is not None:
                    raise file.error
                os.fsync(raw.fileno())
            except OSError as error:
                if error.errno is None or error.errno not in _FULL:
                    raise
                raise _disk_full(error.errno, path, file.size) from error
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _Counted:
    """A file that counts what is written to it.

    After an error it discards the bytes and goes on counting: `torch.save` hides an exception of
    its file behind one of its own, and the size of the whole file is worth knowing.
    """

    def __init__(self, raw: Any) -> None:
        self.raw, self.size = raw, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.size += len(rest)
        written = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[self.raw.write(rest) :]
        except OSError as error:
            self.error = error
        return written

    def flush(self) -> None:
        """Do nothing: no byte waits in a buffer."""


def _disk_full(code: int, path: Path, size: int) -> DiskFull:
    free = shutil.disk_usage(path.parent).free
    kept = "; the file of before is unchanged" if path.exists() else ""
    return DiskFull(
        code,
        f"cannot write {path}: {os.strerror(code).lower()}; it needs {_bytes(size)} and "
        f"{_bytes(free)} are free in {path.parent}{kept}",
    )


def _bytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 1e5 else f"{n:,} bytes"


def save(path: Path, state: dict[str, Any], kind: str, version: int) -> None:
    """Write `state` (tensors and plain values) to `path`; see `write`."""
    write(path, lambda file: torch.save({"kind": kind, "format": version, **state}, file))


def load(
    path: Path, kind: str, version: int, retired: dict[int, str] | None = None
) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; tensors and plain values only, so a file cannot run
    code.

    Args:
        path: the file.
        kind: the kind of state that the caller can use.
        version: the format that the caller can use.
        retired: earlier format -> why it cannot be used.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, or holds another kind or format.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {kind} at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a saved {kind}: {error}") from error
    # Checkpoints written before there were kinds have none.
    known = isinstance(state, dict) and state.get("kind", kind) == kind
    found = state.get("format") if known else None
    if retired and isinstance(found, int) and found in retired:
        raise ValueError(
            f"{path} is a pyadv {kind} of the earlier format {found}: {retired[found]}"
        )
    if found != version:
        raise ValueError(f"{path} is not a pyadv {kind} of format {version}")
    return state
