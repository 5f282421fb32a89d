"""Loading of the compiled kernels.

The order is: kernels built ahead, kernels from the cache, kernels compiled now, and the PyTorch
reference if there are none.

`load()` runs at the first use of any op and does its work once per process. Importing this module
compiles nothing and loads nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from pyadv import _build, _cache
from pyadv._version import __version__

_LABELS = {"cpu": "CPU", "cuda": "CUDA"}
_VARIABLES = (
    *("PYADV_NATIVE", "PYADV_CUDA", "PYADV_CACHE_DIR", "PYADV_VERBOSE", "PYADV_BUILD_TIMEOUT"),
    *("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
)
_NOT_LOADED = "not loaded yet: the first op loads it"


class NativeError(RuntimeError):
    """An error that says why native kernels, which PYADV_NATIVE=1 or `pyadv.build()` asked for, are
    not available."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of one device: the loaded library and where it comes from ("prebuilt", "cache"
    or "compiled"), or the reason why the reference runs instead."""

    path: Path | None = None
    source: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Status:
    """The kernels in use. `problem` says what failed although the user's settings ask for it."""

    cpu: Kernels
    cuda: Kernels
    problem: str | None = None

    @property
    def backend(self) -> str:
        """Return "native" if the CPU kernels are loaded, else "reference"."""
        return "native" if self.cpu.path else "reference"


_status: Status | None = None
_loaded: dict[str, Kernels] = {}
_refused: set[str] = set()  # cache folders that a warning has named
_lock = threading.RLock()


def _after_fork() -> None:
    # A thread of the parent that held the lock does not exist in the child. Loaded libraries stay.
    global _lock
    _lock = threading.RLock()
    _cache.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load() -> Status:
    """Load the native kernels, compiling them if necessary; later calls return at once.

    If that fails, one RuntimeWarning says why and the reference runs.

    Raises:
        NativeError: If it fails and PYADV_NATIVE=1.
        ValueError: If PYADV_NATIVE, PYADV_CUDA or PYADV_VERBOSE has an unknown value.
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
                    _build.warn(_advice(_status) + comfort)
    if _status.problem and demanded:
        raise NativeError(f"pyadv: {_advice(_status)}")
    return _status


def build(force: bool = False) -> Status:
    """Compile the native kernels now instead of at the first op, for instance in a container image.

    Args:
        force: Compile again even if the cache holds a library or a remembered failure. Libraries
            that were built ahead of time stay.

    Raises:
        NativeError: If a library cannot be built; with the compiler's last lines.
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
            raise NativeError(f"pyadv: {_advice(_status)}")
        return _status


def status() -> Status:
    """Return the kernels that this process uses right now, without loading any."""
    return _status or Status(Kernels(reason=_NOT_LOADED), Kernels(reason=_NOT_LOADED))


def describe(kernels: Kernels) -> str:
    """Return one line about the kernels of one device."""
    return f"{kernels.path} ({kernels.source})" if kernels.path else f"none: {kernels.reason}"


def report() -> str:
    """Load the kernels and return a text about the kernels that run and why, for `pyadv info` and
    bug reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the text below says the same
        with contextlib.suppress(NativeError):
            load()
    now = status()
    command, missing = _build.compiler()
    home, ninja = _build.find_cuda(), _build.find_ninja()
    roots, refused = _cache.roots()
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
            f"none: {missing}" if missing else f"{_build.identity(*command)} ({' '.join(command)})",
        ),
        ("nvcc", f"{_build.identity(str(nvcc))} ({nvcc})" if nvcc else "none"),
        ("ninja", " ".join(ninja) if ninja else "none: pip install ninja"),
        ("cache", ", else ".join(map(str, roots)) or "none"),
        *(("refused", str(refusal)) for refusal in refused),
        *((name, os.environ.get(name, "not set")) for name in _VARIABLES),
    ]
    lines = [f"{name:<21}{value}" for name, value in rows]
    if now.problem:
        lines += ["", f"pyadv: {_advice(now)}"]
    return "\n".join(lines)


# The decision


def _mode() -> str:
    return _build.choice("PYADV_NATIVE", ("auto", "0", "1"))


def _verbose() -> bool:
    return _build.choice("PYADV_VERBOSE", ("0", "1")) == "1"


def _start(force: bool) -> Status:
    cuda_mode = _build.cuda_wanted()
    _verbose()  # an unknown value is refused before any work
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
    """Load one library. A failure goes to `problems` and does not affect the other library."""
    plan_of = {"cpu": _build.plan_cpu, "cuda": _build.plan_cuda}[library]
    try:
        plan = plan_of(_build.source_root(), _build.this_torch())
        return _kernels(plan, force, absent)
    except (_build.BuildError, OSError, UnicodeError) as error:
        problems.setdefault(library, str(error))
        return Kernels(reason=str(error).splitlines()[0])


def _kernels(plan: _build.Plan, force: bool, absent: str | None) -> Kernels:
    """Find and load a plan's library; only find it if its device is absent.

    Raises:
        BuildError: If there is no library and none can be built.
        OSError: If the library does not load.
    """
    for last in (False, False, True):
        found = _prebuilt(plan) or _from_cache(plan, force)
        if absent:
            return Kernels(reason=f"{absent}; not loaded: {found.path}")
        # A second copy would register every kernel twice, so a process keeps the first one.
        if plan.library in _loaded:
            break
        try:
            torch.ops.load_library(found.path)
        except OSError:
            # Another process may just have replaced the entry by one that it built anew.
            if last or found.path is None or found.path.exists():
                raise
            continue
        _loaded[plan.library] = found
        break
    return _loaded[plan.library]


def _prebuilt(plan: _build.Plan) -> Kernels | None:
    """Return the library that was compiled ahead into this package, if it is whole and was built
    from these sources."""
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
    try:
        whole = json.loads(_build.manifest_path(path).read_text()) == _build.fingerprint(path)
    except (OSError, ValueError):
        whole = False
    if not whole:
        _build.say(f"pyadv: ignoring {path}, which is not the file that was built")
        return None
    return Kernels(path, "prebuilt")


def _from_cache(plan: _build.Plan, force: bool) -> Kernels:
    """Return the plan's library from the cache, compiling it if there is none or with `force`.

    Raises:
        BuildError: If there is no library and none can be built.
        OSError: If the cache cannot be written.
    """
    roots, refused = _cache.roots()
    if not roots:
        raise _build.BuildError(
            "no cache folder can be used: " + "; ".join(str(refusal) for refusal in refused)
        )
    for refusal in refused:
        if refusal.preferred and str(refusal) not in _refused:
            _refused.add(str(refusal))
            _build.warn(
                f"the cache folder {refusal}. Using {roots[0]} instead. Compiled code from a "
                "folder that others can write to could do anything in this process."
            )
    entries = [_cache.entry(root, plan) for root in roots]
    if not force:
        for entry in entries:
            if path := _cache.library(entry, plan):
                return Kernels(path, "cache")
    if plan.problem:  # no compiler: a library that any compiler built from this recipe will do
        for entry in entries if not force else ():
            for other in entry.parent.glob(f"{plan.recipe_key}-????????"):
                if path := _cache.library(other, plan):
                    return Kernels(path, "cache")
        raise _build.BuildError(plan.problem)
    if not force:
        for entry in entries:
            _raise_remembered(entry, plan)
    return _compiled(_writable(roots, refused, plan), plan, force)


def _raise_remembered(entry: Path, plan: _build.Plan) -> None:
    """Raise the error that an earlier process had with these sources, instead of compiling
    again."""
    if message := _cache.remembered(entry, plan):
        raise _build.CompileError(f"remembered from an earlier try: {message}")


def _writable(roots: list[Path], refused: list[_cache.Refusal], plan: _build.Plan) -> Path:
    """Return the plan's entry in the first cache that can be written."""
    reasons = []
    for root in roots:
        entry = _cache.entry(root, plan)
        try:
            _cache.prepare(root)
            _cache.prepare(entry.parent)
        except (_build.BuildError, OSError) as error:
            reasons.append(f"{root}: {getattr(error, 'strerror', None) or error}")
            continue
        if root != roots[0]:
            _build.say(f"pyadv: the cache folder {roots[0]} cannot be written; using {root}")
        return entry
    raise _build.BuildError(
        f"no cache folder can be written ({'; '.join([*reasons, *map(str, refused)])}); "
        "set PYADV_CACHE_DIR"
    )


def _compiled(entry: Path, plan: _build.Plan, force: bool) -> Kernels:
    label = _LABELS[plan.library]

    def told(owner: str) -> None:
        _build.say(f"pyadv: waiting for {owner}, which compiles the {label} kernels")

    with _cache.lock(entry, told) as held:
        if not force:  # another process may have finished meanwhile, with success or without
            if path := _cache.library(entry, plan):
                return Kernels(path, "cache")
            _raise_remembered(entry, plan)
        _build.say(
            f"pyadv: compiling {label} kernels (first use, about {plan.seconds} s) into {entry}"
        )
        begin = time.monotonic()
        with _cache.working_folder(entry, held) as work:
            log = work / "build.log"
            try:
                (built,) = _build.build([plan], work, log, verbose=_verbose())
            except _build.BuildError as error:
                kept = _cache.beside(entry, ".log")
                with contextlib.suppress(OSError):
                    os.replace(log, kept)
                error = type(error)(str(error).replace(str(log), str(kept)))
                if isinstance(error, _build.CompileError):
                    _cache.remember(entry, plan, error, work)
                raise error from None
            if force:
                _cache.discard(entry, work)
            _cache.publish(entry, plan, built, log, work)
        _build.say(f"pyadv: compiled {label} kernels in {time.monotonic() - begin:.1f} s")
    return Kernels(entry / plan.file, "compiled")


def _advice(now: Status) -> str:
    return (
        f"{now.problem}\nAfter fixing the cause, run pyadv.build(force=True) to compile again; "
        "`python -m pyadv info` shows what is in use."
    )
