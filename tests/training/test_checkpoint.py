"""Checkpoints: whole or not at all, and no code in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from pyadv.training import checkpoint


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": 1})

    def half(state: dict, file) -> None:
        file.write(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["a"] == 1


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.pt")
    path = tmp_path / "c.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a saved checkpoint"):
        checkpoint.load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is not a pyadv checkpoint of format 1"):
        checkpoint.load(path)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "evil": Evil()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match="cannot be read as a saved checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_rng_state_round_trip() -> None:
    state = checkpoint.rng_state()
    drawn = torch.rand(3)
    checkpoint.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
