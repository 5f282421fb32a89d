"""The per-user cache of compiled libraries: trusted folders, entries, locks, remembered failures.

Layout: <root>/torch-<version>/<key>/ holds the library, manifest.json and build.log. Beside it lie
<key>.lock and, after a failure, <key>.failed and <key>.log.

A library in the cache runs inside the process that loads it. So a folder or file counts only if
nobody but this user and root can write to it, and symbolic links inside the cache are refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pyadv import _build

try:
    import fcntl
except ImportError:  # Windows, where nothing is compiled
    fcntl = None  # type: ignore[assignment]  # the usual form of an optional module

PATIENCE = 5.0  # seconds of waiting for another builder before saying so
FORGET = 24 * 3600.0  # seconds after which a remembered failure no longer counts
_LEFTOVER = 24 * 3600.0  # seconds after which a working folder without a lock is abandoned
_OWN = "set PYADV_CACHE_DIR to a folder of your own"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_locks: set[int] = set()  # descriptors of the locks that this process holds


def after_fork() -> None:
    """Close the parent's locks in a forked child: an inherited descriptor would keep a lock that
    the child then waits for, and that nobody releases once the parent has died."""
    for descriptor in _locks:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _locks.clear()


# Choice of folders


@dataclass(frozen=True)
class Refusal:
    """A cache folder that is not used. `setting` names it to the user, `why` says the reason and
    `remedy` how to change that. `preferred` is whether it would have been the first choice."""

    setting: str
    why: str
    remedy: str
    preferred: bool = True

    def __str__(self) -> str:
        return f"{self.setting}: {self.why}; {self.remedy}"


def roots() -> tuple[list[Path], list[Refusal]]:
    """Return the folders to use, the preferred one first, and those that are refused.

    PYADV_CACHE_DIR is the only folder if it is safe. If not, the user's own defaults serve.
    """
    found: list[Path] = []
    refused: list[Refusal] = []
    for setting, named in _named():
        folder = _judged(setting, named)
        if isinstance(folder, Refusal):
            refused.append(replace(folder, preferred=not found))
        elif setting.startswith("PYADV_CACHE_DIR"):
            return [folder], []
        else:
            found.append(folder)
    return found, refused


def _judged(setting: str, named: Path | Refusal) -> Path | Refusal:
    """Return the folder with the links above it followed, or why it is not used."""
    if isinstance(named, Refusal):
        return named
    try:
        # A link above the cache is followed once, here, so that it cannot change later.
        folder = named.parent.resolve() / named.name
    except (RuntimeError, OSError) as error:  # a loop of links
        return Refusal(setting, str(error), _OWN)
    return _refusal(setting, folder) or folder


def _named() -> Iterator[tuple[str, Path | Refusal]]:
    """Yield each folder with the setting that names it, the preferred one first."""
    named = os.environ.get("PYADV_CACHE_DIR")
    if named:
        setting = f"PYADV_CACHE_DIR={named}"
        try:
            yield setting, Path(named).expanduser().absolute()
        except (RuntimeError, OSError) as error:
            yield setting, Refusal(setting, f"{error}".rstrip("."), "set it to an existing folder")
    home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(home):  # the XDG specification ignores relative paths
        yield f"XDG_CACHE_HOME={home}", Path(home) / "pyadv"
    else:
        with contextlib.suppress(RuntimeError):  # a user without a home
            own = Path.home() / ".cache" / "pyadv"
            if own.is_absolute():
                yield str(own), own
    if hasattr(os, "geteuid"):
        with contextlib.suppress(OSError):  # a machine without such a folder
            shared = Path(tempfile.gettempdir()).absolute() / f"pyadv-{os.geteuid()}"
            yield str(shared), shared


def _refusal(setting: str, root: Path) -> Refusal | None:
    """Return why other users could write to the cache in `root`, or None. A root that does not
    exist is judged by the folders above it."""
    why = _unsafe(root)
    if why:
        return Refusal(setting, *why)
    for folder in root.parents:
        why = _unsafe(folder, above=True)
        if why:
            return Refusal(setting, f"{folder} above it {why[0]}", why[1])
    return None


def _unsafe(path: Path, above: bool = False) -> tuple[str, str] | None:
    """Return why someone else could have written `path` and the remedy, or None if it is safe or
    does not exist.

    Args:
        path: A folder or file of the cache, or a folder above it.
        above: Whether `path` lies above the cache. There the sticky bit protects what others do
            not own, the group may be the user's private one, and owners that this user namespace
            cannot name are accepted.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"cannot be examined ({error.strerror})", _OWN
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link", f"remove {path}, or set PYADV_CACHE_DIR to the folder it means"
    if not hasattr(os, "geteuid"):
        return None
    owners = {0, os.geteuid()} | (_unmapped() if above else set())
    if found.st_uid not in owners:
        return f"belongs to another user (uid {found.st_uid})", _OWN
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if above and writable == stat.S_IWGRP and _private(found.st_gid):
        return None
    if writable and not (above and found.st_mode & stat.S_ISVTX):
        mode = stat.S_IMODE(found.st_mode)
        return f"can be written by other users (mode {mode:04o})", f"run `chmod go-w {path}`"
    return None


def _private(group: int) -> bool:
    """Return whether a group is the one that many systems create for this user alone."""
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except (ImportError, KeyError):
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and not found.gr_mem


def _unmapped() -> set[int]:
    """Return the user id that stands for all unmapped owners in a user namespace without root,
    such as a rootless sandbox, where the system's folders belong to nobody."""
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if any(int(first) == 0 and int(count) > 1 for first, _, count in mapped):
            return set()
        return {int(Path("/proc/sys/kernel/overflowuid").read_text())}
    except (OSError, ValueError):
        return set()


def prepare(folder: Path) -> None:
    """Create a folder and those above it that are missing, each for this user alone.

    Raises:
        OSError: If that fails or `folder` cannot be written.
        BuildError: If another user created `folder` in the meantime.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    if why := _unsafe(folder):
        raise _build.BuildError(f"the cache folder {folder} {why[0]}; {why[1]}")
    with tempfile.TemporaryFile(dir=folder):
        pass


# Entries


def entry(root: Path, plan: _build.Plan) -> Path:
    """Return the folder of a plan's library in a cache."""
    return root / f"torch-{plan.recipe['torch']}" / plan.key


def beside(folder: Path, suffix: str) -> Path:
    """Return the file with this suffix beside an entry."""
    return folder.with_name(folder.name + suffix)


def library(folder: Path, plan: _build.Plan) -> Path | None:
    """Return the library of an entry if it is whole and nobody else could have written it. Loading
    a truncated library could crash the process."""
    path, manifest = folder / plan.file, folder / "manifest.json"
    if not folder.is_dir() or any(_unsafe(p) for p in (folder.parent, folder, path, manifest)):
        return None
    try:
        files = json.loads(_read(manifest))["files"]
        whole = files == {plan.file: _build.fingerprint(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if whole else None


def _read(path: Path) -> str:
    """Return the text of a regular file that is not a link; undecodable bytes are replaced."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW)
    with open(descriptor, errors="replace") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def publish(folder: Path, plan: _build.Plan, built: Path, log: Path, work: Path) -> None:
    """Turn a library that was built in `work` into the entry `folder`.

    Where several builders finish at the same time, the first one's entry stays.
    """
    ready = work / "entry"
    ready.mkdir(mode=0o700)
    built.replace(ready / plan.file)
    log.replace(ready / "build.log")
    files = {plan.file: _build.fingerprint(ready / plan.file)}
    (ready / "manifest.json").write_text(json.dumps({"info": plan.info, "files": files}, indent=1))
    for path in ready.iterdir():
        path.chmod(0o600)
    for attempt in range(10):
        try:
            os.rename(ready, folder)
            break
        except OSError:
            if attempt == 9:
                raise
        if library(folder, plan):
            break
        # Broken, or in the way of a forced build. A process that has it mapped keeps it.
        with contextlib.suppress(OSError):
            os.rename(folder, work / f"old-{attempt}")
    with contextlib.suppress(OSError):
        beside(folder, ".failed").unlink()


def discard(folder: Path, work: Path) -> None:
    """Move an entry that is built anew into the working folder, which is removed afterwards."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, work / "discarded")


# Remembered failures


def remember(folder: Path, plan: _build.Plan, error: _build.CompileError, work: Path) -> None:
    """Record that the compiler rejected the sources of a plan, in this environment."""
    part = work / "failed"
    content = {"message": str(error), "environment": plan.environment, "time": time.time()}
    part.write_text(json.dumps(content, indent=1))
    part.replace(beside(folder, ".failed"))  # replaces a link instead of writing through it


def remembered(folder: Path, plan: _build.Plan) -> str | None:
    """Return what an earlier process remembered of this build, or None.

    A record counts for a day and in the environment it was made in. One that cannot be read does
    not count.
    """
    path = beside(folder, ".failed")
    if _unsafe(path):
        return None
    try:
        content = json.loads(_read(path))
        age = time.time() - float(content["time"])
        holds = 0 <= age < FORGET and content["environment"] == plan.environment
        return str(content["message"]) if holds else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Locks and working folders


@contextlib.contextmanager
def lock(folder: Path, told: Callable[[str], None]) -> Iterator[bool]:
    """Hold an entry's lock, so that one process builds at a time, and yield whether it is held.

    The kernel drops the lock when its process dies. Where the file system has no locks, False is
    yielded: then several may build, and the first to finish publishes.

    Args:
        folder: The entry.
        told: Called once with the owner's name, if waiting takes long.

    Raises:
        BuildError: If another builder holds the lock beyond the time limit of a build, or if the
            lock file is a link or can be written by others.
        OSError: If the lock file cannot be opened.
    """
    path, limit = beside(folder, ".lock"), _build.time_limit()
    if why := _unsafe(path):
        raise _build.BuildError(f"the lock {path} {why[0]}; remove it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, 0o600)
    _locks.add(descriptor)
    held = False
    try:
        begin, said = time.monotonic(), False
        while fcntl is not None and not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    break
                waited = time.monotonic() - begin
                if limit is not None and waited > limit:
                    raise _build.BuildError(
                        f"{_owner(descriptor)} has held {path} for {waited:.0f} s; "
                        "PYADV_BUILD_TIMEOUT sets how long to wait"
                    ) from None
                if not said and waited > PATIENCE:
                    told(_owner(descriptor))
                    said = True
                time.sleep(0.1)
        if held:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield held
    finally:
        # A child forked meanwhile is not in this set's process any more: after_fork closed it.
        if descriptor in _locks:
            _locks.discard(descriptor)
            if held:  # closing would not unlock while a forked child holds a copy
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Return the name that the holder of a lock wrote into it."""
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


@contextlib.contextmanager
def working_folder(folder: Path, held: bool) -> Iterator[Path]:
    """Yield a new folder beside an entry and remove it afterwards, with those that killed builders
    left behind: all of them under the lock, else only those that are a day old."""
    for rest in folder.parent.glob(f"{folder.name}.tmp*"):
        with contextlib.suppress(OSError):
            if held or time.time() - rest.lstat().st_mtime > _LEFTOVER:
                shutil.rmtree(rest, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
