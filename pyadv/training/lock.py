"""A lock on a run folder, so that two processes do not write to one run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # the usual form of an optional module

# What flock says where the file system has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class FolderInUse(OSError):
    """Another process trains in the run folder."""


class RunLock:
    """Context manager that holds a run folder for this process.

    A file in the folder names the owner. Where the file system has file locks, it is `run.lock`,
    and the kernel drops the lock when its process dies. Elsewhere the existence of `run.owner` is
    the lock: that of a process that has died on this host is taken over; whether a process of
    another host is alive cannot be known, so its file stays until the user deletes it.

    Args:
        folder: the run folder; it must exist.
        active: False makes the manager do nothing, for all but one process of a distributed run.

    Raises:
        FolderInUse: on entry, if another process holds the folder; the message names it.
    """

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.folder, self.path, self.active = folder, folder / "run.lock", active
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        if self.active and not self._lock_file():
            self.path = self.folder / "run.owner"
            self._create_file()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.active:
            return
        # The file goes before the lock: afterwards it could be another process's.
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock_file(self) -> bool:
        """Lock the file with flock. Return False where that does not exist."""
        while fcntl is not None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_path(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps(_this_process()).encode())
                    self._descriptor = descriptor
                    return True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self.path.unlink(missing_ok=True)
                    return False
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise self._in_use(_read(self.path)) from None
                raise
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        return False

    def _is_at_path(self, descriptor: int) -> bool:
        """Return whether the open file is still the one at the path: its last owner deletes it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _create_file(self) -> None:
        """Create the file, which must not exist, with this process as its owner."""
        text = json.dumps(_this_process())
        for _ in range(2):
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                owner = _read(self.path)
                if not _is_dead(owner):
                    raise self._in_use(owner) from None
                # Only one process can rename the file, so only one takes the lock over.
                stale = self.path.with_name(f"{self.path.name}.{os.getpid()}")
                with contextlib.suppress(FileNotFoundError):
                    self.path.rename(stale)
                    stale.unlink()
            else:
                with os.fdopen(descriptor, "w") as file:
                    file.write(text)
                return
        raise self._in_use(_read(self.path))

    def _in_use(self, owner: dict[str, Any]) -> FolderInUse:
        if not owner:
            who, remedy = "another process", f"if none runs there, delete {self.path}"
        else:
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
            remedy = "wait for it, or stop it"
            if owner["host"] != socket.gethostname():
                remedy += f"; if it is dead, delete {self.path}"
        return FolderInUse(f"{self.folder} is in use by {who}: {remedy}")


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the owner that the file names, {} if it names none."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return owner if {"pid", "host", "since"} <= owner.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return whether the owner is a process of this host that has ended."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to another user
        pass
    # A process number is used again; the time at which the process started tells.
    then, now = owner.get("started"), _started(pid)
    return None not in (then, now) and then != now


def _started(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; None where that is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
