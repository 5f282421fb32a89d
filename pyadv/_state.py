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


def load(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; tensors and plain values only, so a file cannot run
    code.

    Raises FileNotFoundError, or ValueError for a file that `save` did not write for this `kind`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {kind} at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a saved {kind}: {error}") from error
    # Checkpoints written before there were kinds have none.
    known = isinstance(state, dict) and state.get("kind", kind) == kind
    if not known or state.get("format") != version:
        raise ValueError(f"{path} is not a pyadv {kind} of format {version}")
    return state
