"""Finds and loads the compiled kernels: built ahead, else from the cache, else compiled now, else
the PyTorch reference runs.

`load()` runs at the first use of any op and does all of it once per process. Importing this module
compiles nothing and loads nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pyadv import _build
from pyadv._version import __version__

try:
    import fcntl
except ImportError:  # Windows: nothing is compiled there, so nothing is locked
    fcntl = None

_LABELS = {"cpu": "CPU", "cuda": "CUDA"}
_VARIABLES = (
    *("PYADV_NATIVE", "PYADV_CUDA", "PYADV_CACHE_DIR", "PYADV_VERBOSE"),
    *("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
)
_PATIENCE = 5.0  # seconds of waiting for another builder before saying so
_NOT_LOADED = "not loaded yet: the first op loads it"


class NativeError(RuntimeError):
    """The native kernels were demanded, by PYADV_NATIVE=1 or `pyadv.build()`, and cannot be had."""


@dataclass(frozen=True)
class Kernels:
    """One device's kernels: the loaded library and where it comes from ("prebuilt", "cache" or
    "compiled"), or the reason why the reference runs instead."""

    path: Path | None = None
    source: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Status:
    """What runs the ops. `problem` is what went wrong against the user's wish, if anything did."""

    cpu: Kernels
    cuda: Kernels
    problem: str | None = None

    @property
    def backend(self) -> str:
        """ "native" if the CPU kernels are loaded, else "reference"."""
        return "native" if self.cpu.path else "reference"


_status: Status | None = None
_loaded: dict[str, Kernels] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    # Another thread of the parent may have held the lock; what is loaded stays loaded in the child.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load() -> Status:
    """Load the native kernels, compiling them if need be; later calls return at once.

    Where that fails, one RuntimeWarning says why and the reference runs; with PYADV_NATIVE=1 a
    NativeError is raised instead. ValueError if PYADV_NATIVE or PYADV_CUDA has an unknown value.
    """
    global _status
    demanded = _mode() == "1"
    if _status is None:
        with _lock:
            if _status is None:
                _status = _start(force=False)
                if _status.problem and not demanded:
                    comfort = (
                        " Until then the slower PyTorch reference runs, which PYADV_NATIVE=0 "
                        "chooses without a warning."
                    )
                    warnings.warn(_advice(_status) + comfort, RuntimeWarning, stacklevel=2)
    if _status.problem and demanded:
        raise NativeError(_advice(_status))
    return _status


def build(force: bool = False) -> Status:
    """Compile the native kernels now instead of at the first op, for instance in a container image.

    Finds those built ahead or cached first. `force=True` compiles again what is not built ahead,
    and forgets a remembered failure. Raises NativeError with the compiler's last lines.
    """
    global _status
    if _mode() == "0":
        raise NativeError(
            "PYADV_NATIVE=0 turns the native kernels off, so there is nothing to build"
        )
    with _lock:
        if force or _status is None or _status.problem:
            _status = _start(force)
        if _status.problem:
            raise NativeError(_advice(_status))
        return _status


def status() -> Status:
    """What runs the ops in this process right now. Loads nothing."""
    return _status or Status(Kernels(reason=_NOT_LOADED), Kernels(reason=_NOT_LOADED))


def describe(kernels: Kernels) -> str:
    """One line on one device's kernels."""
    return f"{kernels.path} ({kernels.source})" if kernels.path else f"none: {kernels.reason}"


def report() -> str:
    """What runs and why, as text: for `pyadv info` and for bug reports. Loads the kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the text below says the same
        with contextlib.suppress(NativeError):
            load()
    now = status()
    compiler, home, ninja = _build.find_compiler(), _build.find_cuda(), _build.find_ninja()
    nvcc = home / "bin" / "nvcc" if home else None
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("pyadv", f"{__version__} in {Path(__file__).parent}"),
        ("backend", now.backend),
        *((f"{name} kernels", describe(getattr(now, name.lower()))) for name in ("CPU", "CUDA")),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("cards", ", ".join(cards) or "none visible"),
        (
            "compiler",
            f"{_build.identity(*compiler)} ({' '.join(compiler)})" if compiler else "none",
        ),
        ("nvcc", f"{_build.identity(str(nvcc))} ({nvcc})" if nvcc else "none"),
        ("ninja", " ".join(ninja) if ninja else "none: pip install ninja"),
        ("cache", ", else ".join(str(root) for root in _cache_roots())),
        *((name, os.environ.get(name, "not set")) for name in _VARIABLES),
    ]
    lines = [f"{name:<21}{value}" for name, value in rows]
    if now.problem:
        lines += ["", _advice(now)]
    return "\n".join(lines)


# The decision


def _mode() -> str:
    return _build.choice("PYADV_NATIVE", ("auto", "0", "1"))


def _start(force: bool) -> Status:
    cuda_mode = _build.cuda_wanted()
    if _mode() == "0":
        off = Kernels(reason="PYADV_NATIVE=0")
        return Status(off, off)
    importlib.import_module("pyadv.ops")  # the schemas that the libraries add kernels to
    problems: dict[str, str] = {}
    absent = None
    if torch.version.cuda is None:
        absent = "this PyTorch has no CUDA"
    elif not torch.cuda.is_available():
        absent = "no CUDA device is visible"
    cpu = _attempt("cpu", problems, force)
    if cuda_mode == "0":
        cuda = Kernels(reason="PYADV_CUDA=0")
    elif cuda_mode == "auto" and absent:
        cuda = Kernels(reason=absent)
    else:
        cuda = _attempt("cuda", problems, force, absent)
    lines = [f"no native {_LABELS[name]} kernels: {why}" for name, why in problems.items()]
    return Status(cpu, cuda, "\n".join(lines) or None)


def _attempt(
    library: str, problems: dict[str, str], force: bool, absent: str | None = None
) -> Kernels:
    """One library; a failure goes to `problems` and leaves the other library alone."""
    plan_of = {"cpu": _build.plan_cpu, "cuda": _build.plan_cuda}[library]
    try:
        plan = plan_of(_build.source_root(), _build.this_torch())
        return _kernels(plan, force, absent)
    except (_build.BuildError, OSError) as error:
        problems.setdefault(library, str(error))
        return Kernels(reason=str(error).splitlines()[0])


def _kernels(plan: _build.Plan, force: bool, absent: str | None) -> Kernels:
    """The plan's library, loaded unless its device is absent. Raises BuildError or OSError."""
    found = _prebuilt(plan) or _from_cache(plan, force)
    if absent:
        return Kernels(reason=f"{absent}; not loaded: {found.path}")
    # A second copy would register every kernel twice, so a process keeps the one it has.
    if plan.library not in _loaded:
        torch.ops.load_library(found.path)
        _loaded[plan.library] = found
    return _loaded[plan.library]


def _prebuilt(plan: _build.Plan) -> Kernels | None:
    """The library that was compiled ahead into this package, if it is made of these sources."""
    try:
        info = importlib.import_module("pyadv._C").build_info().get(plan.library)
    except ImportError:
        return None
    path = Path(__file__).parent / plan.file
    same = ("sources", "flags", "machine")
    if not info or not path.is_file() or any(info.get(k) != plan.recipe[k] for k in same):
        return None
    if plan.library == "cuda":
        if info["cuda"].split(".")[0] != plan.recipe["cuda"].split(".")[0]:
            return None
        compiled = info["architectures"].split(";")
        if not all(_build.serves(compiled, card) for card in _build.visible_cards()):
            return None
    return Kernels(path, "prebuilt")


# The cache: <root>/torch-<version>/<key>/ holds the library, manifest.json and build.log;
# <key>.lock and <key>.failed lie beside it.


def _cache_roots() -> list[Path]:
    """Folders to look in, the preferred one first."""
    named = os.environ.get("PYADV_CACHE_DIR")
    if named:
        return [Path(named).expanduser().absolute()]
    home = os.environ.get("XDG_CACHE_HOME")
    roots = [Path(home) / "pyadv"] if home else []
    if not home:
        with contextlib.suppress(RuntimeError):  # a user without a home
            roots.append(Path.home() / ".cache" / "pyadv")
    if hasattr(os, "getuid"):
        shared = Path(tempfile.gettempdir()) / f"pyadv-{os.getuid()}"
        with contextlib.suppress(FileNotFoundError):
            if shared.lstat().st_uid != os.getuid():  # another user could put libraries there
                return roots
        roots.append(shared)
    return roots


def _entry(root: Path, plan: _build.Plan) -> Path:
    return root / f"torch-{plan.recipe['torch']}" / plan.key


def _from_cache(plan: _build.Plan, force: bool) -> Kernels:
    roots = _cache_roots()
    if not force:
        for root in roots:
            if path := _cached(_entry(root, plan), plan):
                return Kernels(path, "cache")
        if plan.problem:  # no compiler: what another compiler made of the same recipe serves too
            for root in roots:
                for entry in _entry(root, plan).parent.glob(f"{plan.recipe_key}-????????"):
                    if path := _cached(entry, plan):
                        return Kernels(path, "cache")
    if plan.problem:
        raise _build.BuildError(plan.problem)
    if not force:
        for root in roots:
            _raise_remembered(_entry(root, plan))
    return _compiled(_entry(_writable(roots), plan), plan, force)


def _cached(entry: Path, plan: _build.Plan) -> Path | None:
    """The entry's library if it is whole: loading a truncated one could crash the process."""
    path = entry / plan.file
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        whole = manifest["files"] == {plan.file: _fingerprint(path)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if whole else None


def _fingerprint(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _raise_remembered(entry: Path) -> None:
    """Raise what an earlier process met, instead of compiling the same sources in vain again."""
    failed = _beside(entry, ".failed")
    if failed.is_file():
        raise _build.BuildError(f"remembered from an earlier try: {failed.read_text()}")


def _beside(entry: Path, suffix: str) -> Path:
    return entry.with_name(entry.name + suffix)


def _writable(roots: list[Path]) -> Path:
    refused = "there is none"
    for root in roots:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            refused = f"{root}: {error.strerror}"
            continue
        if root != roots[0]:
            _say(f"the cache folder {roots[0]} cannot be written; using {root}")
        return root
    raise _build.BuildError(f"no cache folder can be written ({refused}); set PYADV_CACHE_DIR")


def _compiled(entry: Path, plan: _build.Plan, force: bool) -> Kernels:
    entry.parent.mkdir(mode=0o700, exist_ok=True)
    with _file_lock(_beside(entry, ".lock"), plan) as locked:
        if not force:  # another process may have finished meanwhile, well or not
            if path := _cached(entry, plan):
                return Kernels(path, "cache")
            _raise_remembered(entry)
        if locked:  # leftovers of builders that were killed
            for rest in entry.parent.glob(f"{entry.name}.tmp*"):
                shutil.rmtree(rest, ignore_errors=True)
        label = _LABELS[plan.library]
        _say(f"compiling {label} kernels (first use, about {plan.seconds} s) into {entry}")
        begin = time.monotonic()
        work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp", dir=entry.parent))
        try:
            _build_entry(entry, plan, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _say(f"compiled {label} kernels in {time.monotonic() - begin:.1f} s")
    return Kernels(entry / plan.file, "compiled")


def _build_entry(entry: Path, plan: _build.Plan, work: Path) -> None:
    verbose = _build.choice("PYADV_VERBOSE", ("0", "1")) == "1"
    failed, log = _beside(entry, ".failed"), _beside(entry, ".log")
    try:
        (library,) = _build.build([plan], work, log, verbose=verbose)
    except _build.BuildError as error:
        failed.write_text(str(error))
        raise
    ready = work / "entry"
    ready.mkdir()
    library.replace(ready / plan.file)
    log.replace(ready / "build.log")
    manifest = {"info": plan.info, "files": {plan.file: _fingerprint(ready / plan.file)}}
    (ready / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if entry.exists():  # broken, or to be built anew; whoever has it mapped keeps it
        os.replace(entry, work / "old")
    os.replace(ready, entry)
    failed.unlink(missing_ok=True)


@contextlib.contextmanager
def _file_lock(path: Path, plan: _build.Plan) -> Iterator[bool]:
    """One builder at a time. The kernel drops the lock when its process dies, however it dies.
    Yields False where the file system has no locks: then two may build, and the later one wins."""
    with path.open("a+") as file:
        begin, told, locked = time.monotonic(), False, False
        while fcntl is not None and not locked:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
                if not told and time.monotonic() - begin > _PATIENCE:
                    file.seek(0)
                    owner = file.read().strip() or "another process"
                    _say(f"waiting for {owner}, which compiles the {_LABELS[plan.library]} kernels")
                    told = True
                time.sleep(0.1)
        if locked:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield locked


# Words


def _say(line: str) -> None:
    print(f"pyadv: {line}", file=sys.stderr, flush=True)


def _advice(now: Status) -> str:
    return (
        f"pyadv: {now.problem}\nOnce that is mended, pyadv.build(force=True) compiles again; "
        "`python -m pyadv info` shows what is in use."
    )
