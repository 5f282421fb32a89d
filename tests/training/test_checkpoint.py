"""Checkpoints are written whole or not at all, and reading them runs no code."""

from __future__ import annotations

import errno
import os
import pickle
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyadv import _state
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
    assert list(tmp_path.iterdir()) == [path]


def limit_file_size(size: int) -> Callable[[], None]:
    """Limit the size of files of this process, and return a function that lifts the limit."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    """The system refuses the bytes beyond a limit, as it does on a full disk."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": 1})
    lift = limit_file_size(100_000)
    try:
        with pytest.raises(OSError, match="cannot write .*c.pt: file too large; it needs 4.0 MB "):
            checkpoint.save(path, {"a": torch.zeros(1_000_000)})
    finally:
        lift()
    assert list(tmp_path.iterdir()) == [path] and checkpoint.load(path)["a"] == 1


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the first bytes alone, and one that is full when the bytes reach it."""
    path, fsync = tmp_path / "c.pt", os.fsync

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words = r"cannot write .*c.pt: no space left on device; it needs 4.0 MB and [\d,.]+ MB are free"
    with pytest.raises(OSError, match=words) as caught:
        checkpoint.save(path, {"a": torch.zeros(1_000_000)})
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", fsync)
    write = _state._Counted.write

    def small(self: _state._Counted, data: bytes) -> int:
        if self.size > 1000:
            self.raw = types.SimpleNamespace(write=full)
        return write(self, data)

    monkeypatch.setattr(_state._Counted, "write", small)
    with pytest.raises(OSError, match=words):
        checkpoint.save(path, {"a": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


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
