"""Files that hold the state of long work: written whole or not at all, read without running
code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any], kind: str, version: int) -> None:
    """Write `state` (tensors and plain values) to `path` so that a reader finds the old file or the
    new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"kind": kind, "format": version, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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
