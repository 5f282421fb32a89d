"""Build plans for the native libraries: sources, flags, content keys and the ninja file.

`setup.py` builds ahead of time with this module and `pyadv._native` builds at the first use, so
both produce the same libraries. Only the standard library is imported at module level, because
`setup.py` loads this file by its path and PyTorch may be missing there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Oldest PyTorch that can load the kernels. They use its stable ABI, which later releases keep.
TARGET = (2, 11)

# The kernels must equal the reference bit for bit on every machine. So there is no contraction to
# FMA, no fast-math and no -march (wider vectors are function clones chosen at run time), and
# CXXFLAGS is ignored. A -ffast-math in CXX is undone, also for the linker, which would otherwise
# add start-up code that makes the whole process flush denormal numbers to zero.
HOST_FLAGS = (
    "-fno-fast-math -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -fno-trapping-math"
    " -fno-math-errno -Wall -Wextra"
    f" -DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"
).split()
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
DEFAULT_ARCHITECTURES = ("8.0", "9.0+PTX")

# Files that belong to one library only. csrc/common and csrc/glue belong to both op libraries.
_ONLY_CPU = ("cpu/", "ops_cpu.cpp")
_ONLY_CUDA = ("cuda/", "ops_cuda.cpp")
_ONLY_MODULE = ("module.cpp",)
_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}

# Environment variables that nvcc reads as extra flags, so they belong to the key of a build.
_NVCC_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
# Environment variables that decide whether a build succeeds: a remembered failure holds only as
# long as they stay the same.
_ENVIRONMENT = (
    *("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH"),
    *("GCC_EXEC_PREFIX", "COMPILER_PATH", *_NVCC_VARIABLES),
)
TIME_LIMIT = 1800.0  # seconds for one build, unless PYADV_BUILD_TIMEOUT says otherwise
_VERSION_LIMIT = 60.0  # seconds for `compiler --version`
_MAX_SCRIPT = 1 << 20  # bytes; a compiler that is a larger file is not a wrapper script

# A compiler error names a place in a source file; a linker error names a symbol.
_DIAGNOSTIC = re.compile(
    r"^\S.*?(:\d+(:\d+)?: (fatal )?error: |\(\d+\): (catastrophic )?error\b)"
    r"|undefined (reference to|symbol)|multiple definition of|duplicate symbol",
    re.MULTILINE,
)
# The machine, not the source, made the compiler fail.
_TRANSIENT = re.compile(
    r"\bkilled\b|terminated by signal|terminated program|internal compiler error"
    r"|out of memory|cannot allocate memory|virtual memory exhausted|bad_alloc"
    r"|no space left|disk quota exceeded|input/output error|segmentation fault|bus error"
    r"|resource temporarily unavailable|stale file handle|too many open files|interrupted",
    re.IGNORECASE,
)


class BuildError(RuntimeError):
    """A library was not built; the message says why and what would help."""


class CompileError(BuildError):
    """The compiler or the linker rejected the sources, so the same build would fail again."""


def choice(name: str, values: Sequence[str]) -> str:
    """Return the environment variable `name`, or the first of `values` if it is unset or empty.

    Raises:
        ValueError: If the variable has a value that is not one of `values`.
    """
    value = os.environ.get(name, "") or values[0]
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}; got {value!r}")
    return value


def cuda_wanted() -> str:
    """Return PYADV_CUDA: "auto" (build CUDA kernels where nvcc and a PyTorch with CUDA exist),
    "0" (never) or "1" (always)."""
    return choice("PYADV_CUDA", ("auto", "0", "1"))


def jobs() -> int | None:
    """Return how many compilers may run at once (MAX_JOBS), or None if ninja decides.

    A value that is not a positive integer is ignored with a warning.
    """
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return None
    if re.fullmatch(r"[0-9]{1,6}", given) and int(given) > 0:
        return int(given)
    warn(f"MAX_JOBS must be a positive integer; ignoring MAX_JOBS={given!r}")
    return None


def time_limit() -> float | None:
    """Return the time limit of a build in seconds (PYADV_BUILD_TIMEOUT), or None for no limit.

    A value that is not a number of seconds is ignored with a warning.
    """
    given = os.environ.get("PYADV_BUILD_TIMEOUT", "").strip()
    if not given:
        return TIME_LIMIT
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", given):
        return float(given) or None
    warn(
        "PYADV_BUILD_TIMEOUT must be a number of seconds (0 for no limit); ignoring "
        f"PYADV_BUILD_TIMEOUT={given!r}"
    )
    return TIME_LIMIT


def say(line: str) -> None:
    """Print a line to stderr. Ignore a closed or broken stderr, which must not stop a build."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Give a RuntimeWarning. Ignore a closed or broken stderr, which must not stop a build."""
    with contextlib.suppress(OSError, ValueError):
        warnings.warn(f"pyadv: {message}", RuntimeWarning, stacklevel=3)


def source_root() -> Path:
    """Return the folder of C++ sources, inside an installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: neither {package / '_csrc'} nor a checkout")


# Tools


@dataclass(frozen=True)
class Torch:
    """A PyTorch installation to compile against."""

    version: str
    cuda: str | None
    root: Path

    @property
    def standard(self) -> str:
        """Return the flag for the C++ standard that its headers need. Our own sources are C++17."""
        release = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        return "-std=c++20" if release >= (2, 13) else "-std=c++17"


def this_torch() -> Torch:
    """Return the PyTorch that `import torch` loads."""
    import torch

    return Torch(str(torch.__version__), torch.version.cuda, Path(torch.__file__).resolve().parent)


def find_compiler() -> list[str] | None:
    """Return the C++ compiler as a command, or None if there is none that runs."""
    return compiler()[0] or None


def compiler() -> tuple[list[str], str | None]:
    """Return the C++ compiler as a command and, if none runs, the reason.

    CXX may hold flags and wrappers (`nice g++`, `env A=1 g++`, `ccache g++`). If it is set, no
    other compiler is tried. Relative paths become absolute, because ninja runs in another folder.
    """
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        return ([_absolute(found)], None) if found else ([], "c++, g++ and clang++ are not on PATH")
    try:
        words = shlex.split(named)
    except ValueError as error:
        return [], f"CXX={named} is not a command: {str(error)[0].lower()}{str(error)[1:]}"
    if not words or not shutil.which(words[0]):
        return [], f"CXX={named} does not run"
    words = [_absolute(word) for word in words]
    _, failure = _version(*words)
    return ([], f"CXX={named} does not run: {failure}") if failure else (words, None)


def _absolute(word: str) -> str:
    """Return a program that is named by a relative path as an absolute path; other words stay."""
    located = None if word.startswith("-") else shutil.which(word)
    if located is None or (os.sep not in word and os.path.isabs(located)):
        return word
    return os.path.abspath(located)


def _options(command: Sequence[str]) -> str:
    """Return what a compiler command holds beyond the compiler's version: flags, wrappers and
    their settings. Programs are given by name without their folder, scripts by their content."""
    words = []
    for word in command:
        located = None if word.startswith("-") else shutil.which(word)
        words.append(_script(located) or os.path.basename(located) if located else word)
    if len(words) == 1 and not words[0].startswith("script "):
        return ""
    return shlex.join(words)


def _script(program: str) -> str | None:
    """Return a fingerprint of a script, or None for a binary: a wrapper may add flags of its own,
    which `--version` does not show."""
    try:
        with open(program, "rb") as file:
            head = file.read(_MAX_SCRIPT + 1)
    except OSError:
        return None
    if not head.startswith(b"#!") or len(head) > _MAX_SCRIPT:
        return None
    return f"script {hashlib.sha256(head).hexdigest()[:16]}"


def find_cuda() -> Path | None:
    """Return the folder of the first CUDA toolkit with an nvcc and a runtime library, or None."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    found = [Path(on_path).resolve().parent.parent] if on_path else []
    for home in [*(Path(name) for name in named if name), *found, Path("/usr/local/cuda")]:
        if os.access(home / "bin" / "nvcc", os.X_OK) and _cuda_runtime(home):
            return home
    return None


def find_ninja() -> list[str] | None:
    """Return ninja as a command: the Python package, which needs no PATH, or the program."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    return [program] if program else None


def identity(*command: str) -> str:
    """Return a compiler's name and version, without its path."""
    line, _ = _version(*command)
    return line or f"unknown ({os.path.basename(command[0])} --version failed)"


@functools.lru_cache
def _version(*command: str) -> tuple[str, str | None]:
    """Return the line of `command --version` that names the version and, if the command could not
    be run at all, the reason."""
    try:
        done = subprocess.run(
            [*command, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_VERSION_LIMIT,
        )
    except OSError as error:
        return "", error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return "", f"`--version` took longer than {_VERSION_LIMIT:g} s"
    if done.returncode in (126, 127):  # a wrapper could not start the compiler
        return "", done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "not found"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc names its version in line 4
    return " ".join(release or lines[:1]), None


@functools.lru_cache
def visible_cards() -> tuple[str, ...]:
    """Return the compute capabilities of the visible cards, such as ("9.0",). Asking the driver
    needs neither PyTorch nor a context on a card."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device, major, minor = (ctypes.c_int(0) for _ in range(4))
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    cards = set()
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        for value, attribute in ((major, 75), (minor, 76)):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        cards.add((major.value, minor.value))
    return tuple(f"{major}.{minor}" for major, minor in sorted(cards))


def architectures() -> tuple[str, ...]:
    """Return the architectures to compile CUDA kernels for: TORCH_CUDA_ARCH_LIST, else those of
    the visible cards, else DEFAULT_ARCHITECTURES."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in named:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected forms like 9.0 or 9.0+PTX; got {name!r}"
            )
    return tuple(named) or visible_cards() or DEFAULT_ARCHITECTURES


def serves(compiled: Iterable[str], card: str) -> bool:
    """Return whether kernels compiled for these architectures run on a card.

    A card runs code of its own major version and no newer minor version, and any older PTX.
    """
    have = tuple(int(part) for part in card.split("."))
    for name in compiled:
        base, _, ptx = name.partition("+")
        major, minor = (int(part) for part in re.findall(r"\d+", base))
        if base[-1] in "af":
            if (major, minor) == have:
                return True
        elif (major == have[0] or ptx) and (major, minor) <= have:
            return True
    return False


# Plans


@dataclass(frozen=True)
class Plan:
    """The plan to build one library: everything that decides its bytes, and the commands.

    `recipe` and `tools` hold no time and no folder of this machine (unless CXX names one in a
    flag), so equal content has an equal key everywhere. They are hashed separately, so that a
    machine without a compiler can use a library that any compiler built from the same recipe.
    """

    library: str
    file: str
    recipe: dict[str, str]
    tools: dict[str, str]
    compile: tuple[tuple[Path, tuple[str, ...]], ...] = field(repr=False)
    link: tuple[str, ...] = field(repr=False)
    problem: str | None = None

    @property
    def info(self) -> dict[str, str]:
        return {**self.recipe, **self.tools}

    @property
    def recipe_key(self) -> str:
        return f"{self.library}-{_digest(self.recipe)[:12]}"

    @property
    def key(self) -> str:
        return f"{self.recipe_key}-{_digest(self.tools)[:8]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the conditions outside the key that can make a build fail: search paths, and the
        files of the tools. A failure is remembered for this environment only."""
        found = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
        words = {word for _, command in self.compile for word in command}
        for word in sorted(word for word in words if not word.startswith("-")):
            if program := shutil.which(word):
                real = os.path.realpath(program)
                now = os.stat(real)
                found[word] = f"{real} {now.st_size} {now.st_mtime_ns}"
        return found

    @property
    def seconds(self) -> int:
        """Return a rough estimate of the build's wall time, for a message to the user."""
        cuda = 25 * len(self.recipe.get("architectures", "").split(";"))
        work = sum(cuda if source.suffix == ".cu" else 10 for source, _ in self.compile)
        return round(max(work / (os.cpu_count() or 1), 5))


def plan_cpu(csrc: Path, torch: Torch) -> Plan:
    """Return the plan of _ops.so, the CPU kernels."""
    files = _sources(csrc, without=_ONLY_CUDA + _ONLY_MODULE)
    command, problem = _compiler()
    recipe = _recipe(csrc, files, torch)
    return Plan(
        library="cpu",
        file="_ops.so",
        recipe=recipe,
        tools=_tools(command),
        compile=tuple((path, (*command, *_host_flags(csrc, torch))) for path in _units(files)),
        link=(*command, "-fno-fast-math", "-shared", *_link_flags(torch)),
        problem=problem,
    )


def plan_cuda(csrc: Path, torch: Torch) -> Plan:
    """Return the plan of _ops_cuda.so, the CUDA kernels. No other library needs CUDA."""
    files = _sources(csrc, without=_ONLY_CPU + _ONLY_MODULE)
    command, problem = _compiler()
    names = architectures()
    home = find_cuda()
    nvcc: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    version = "none"
    if home is None:
        problem = "no CUDA toolkit (nvcc and libcudart) found: install one, or set CUDA_HOME"
    else:
        nvcc, runtime = (str(home / "bin" / "nvcc"),), (str(_cuda_runtime(home)),)
        version = identity(*nvcc)
        major = re.search(r"release (\d+)", version)
        # The library shares PyTorch's CUDA runtime, and each major version has its own.
        if torch.cuda and major and major[1] != torch.cuda.split(".")[0]:
            problem = f"{nvcc[0]} is CUDA {major[1]}, but PyTorch was built for CUDA {torch.cuda}"
    programs = [word for word in command if not word.startswith("-") and shutil.which(word)]
    host = [f"-ccbin={word}" for word in programs][-1:]
    device = (*nvcc, *NVCC_FLAGS, f"-I{csrc}", *_gencode(names), *host)
    recipe = _recipe(csrc, files, torch)
    recipe |= {
        "nvcc_flags": " ".join(NVCC_FLAGS),
        "cuda": torch.cuda or "none",
        "architectures": ";".join(names),
    }
    return Plan(
        library="cuda",
        file="_ops_cuda.so",
        recipe=recipe,
        tools={
            **_tools(command),
            "nvcc": version,
            **{name: os.environ[name] for name in _NVCC_VARIABLES if os.environ.get(name)},
        },
        compile=tuple(
            (path, device if path.suffix == ".cu" else (*command, *_host_flags(csrc, torch)))
            for path in _units(files)
        ),
        link=(*command, "-fno-fast-math", "-shared", *_link_flags(torch), *runtime),
        problem=problem,
    )


def plan_module(csrc: Path, work: Path, plans: Iterable[Plan]) -> Plan:
    """Return the plan of _C, the Python module that records how the libraries beside it were
    built ahead of time."""
    info = json.dumps({plan.library: plan.info for plan in plans}, indent=1, sort_keys=True)
    header = work / "build_info.h"
    text = f'constexpr char kBuildInfo[] = R"json({info})json";\n'
    work.mkdir(parents=True, exist_ok=True)
    if not header.is_file() or header.read_text() != text:  # ninja compares modification times
        header.write_text(text)
    command, problem = _compiler()
    includes = [sysconfig.get_path("include")]
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is not None and pybind11.origin is not None:
        includes.append(str(Path(pybind11.origin).parent / "include"))
    else:
        problem = problem or "compiling ahead needs pybind11: pip install pybind11 ninja"
    flags = (*HOST_FLAGS, "-std=c++17", f"-I{work}", *(f"-isystem{path}" for path in includes))
    return Plan(
        library="module",
        file="_C" + sysconfig.get_config_var("EXT_SUFFIX"),
        recipe={"python": sysconfig.get_config_var("SOABI")},
        tools={},
        compile=((csrc / "module.cpp", (*command, *flags)),),
        link=(*command, "-shared"),
        problem=problem,
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sources(csrc: Path, without: tuple[str, ...]) -> list[Path]:
    names = (path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.is_file())
    kept = (name for name in names if not name.startswith(without))
    return [csrc / name for name in sorted(kept) if Path(name).suffix in _SUFFIXES]


def _units(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.suffix in {".cpp", ".cu"}]


def _compiler() -> tuple[tuple[str, ...], str | None]:
    """Return the command that compiles and links, and the reason if nothing can be built here."""
    if not sys.platform.startswith("linux"):
        return (), f"native kernels are built on Linux only, not on {sys.platform}"
    command, missing = compiler()
    if missing:
        advice = "install one (Debian: apt-get install g++) or set CXX"
        return (), f"no C++ compiler: {missing}; {advice}"
    if find_ninja() is None:
        return tuple(command), "ninja is missing: pip install ninja"
    return tuple(command), None


def _tools(command: Sequence[str]) -> dict[str, str]:
    """Return the part of a key that describes the compiler command."""
    if not command:
        return {"compiler": "none"}
    options = _options(command)
    return {"compiler": identity(*command)} | ({"command": options} if options else {})


def _recipe(csrc: Path, files: list[Path], torch: Torch) -> dict[str, str]:
    content = [(path.relative_to(csrc).as_posix(), path.read_bytes().hex()) for path in files]
    return {
        "sources": _digest(content)[:16],
        "flags": " ".join(HOST_FLAGS),
        "standard": torch.standard,
        "torch": torch.version,
        "machine": platform.machine(),
    }


def _host_flags(csrc: Path, torch: Torch) -> tuple[str, ...]:
    # The prefix maps keep the folders of this machine out of the library and its messages.
    headers = torch.root / "include"
    maps = (f"-ffile-prefix-map={folder}/=" for folder in (csrc, headers))
    return (*HOST_FLAGS, torch.standard, f"-I{csrc}", f"-isystem{headers}", *maps)


def _link_flags(torch: Torch) -> tuple[str, ...]:
    # -z defs turns undefined symbols into link errors instead of load errors. An rpath is not
    # needed, because PyTorch is loaded before this library.
    return ("-Wl,-z,defs", f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ldl")


def _gencode(names: Iterable[str]) -> list[str]:
    flags = []
    for name in names:
        number, _, ptx = name.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _cuda_runtime(home: Path) -> Path | None:
    """Return the path of libcudart. It is linked shared, so that PyTorch's loaded copy serves."""
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    return next((p for folder in folders for p in home.glob(f"{folder}/libcudart.so*")), None)


# Building


def build(
    plans: Sequence[Plan], work: Path, log: Path | None = None, *, verbose: bool = False
) -> list[Path]:
    """Compile the plans in `work` and return the libraries' paths, in order.

    Objects from an earlier build in `work` are reused if nothing they depend on has changed. The
    output goes to `log` (by default `work`/build.log) and, with `verbose`, to stderr as well.

    Raises:
        CompileError: If the compiler or the linker rejected the sources; with its last lines.
        BuildError: If the build failed for another reason: a missing tool, a killed compiler, a
            full disk, the time limit.
    """
    for plan in plans:
        if plan.problem:
            raise BuildError(plan.problem)
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_bytes(os.fsencode(_ninja_file(plans)))
    command = find_ninja() or ["ninja"]
    if limit := jobs():
        command += ["-j", str(limit)]
    if verbose:
        command += ["-v"]
    log = log or work / "build.log"
    seconds = time_limit()
    status = _run(command, work, log, seconds, verbose)
    if status == 0:
        return [work / plan.file for plan in plans]
    output = log.read_text(errors="replace")
    tail = "".join(output.splitlines(keepends=True)[-25:])
    if status is None:
        raise BuildError(
            f"compiling took longer than {seconds:g} s and was stopped (log: {log}); "
            "PYADV_BUILD_TIMEOUT sets the limit in seconds, 0 for none. The last lines:\n" + tail
        )
    if _DIAGNOSTIC.search(output) and not _TRANSIENT.search(output):
        raise CompileError(f"compiling failed (log: {log}); its last lines:\n{tail}")
    raise BuildError(
        f"compiling did not finish (exit status {status}, log: {log}). The compiler reported no "
        f"error in the sources, so the next process tries again. The last lines:\n{tail}"
    )


def _run(
    command: list[str], work: Path, log: Path, seconds: float | None, verbose: bool
) -> int | None:
    """Run a command in `work` and return its exit status, or None if the time limit ended it.

    The command leads a session of its own, so that its compilers can be ended with it.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with log.open("wb") as file, log.open(errors="replace") as echo:
        process = subprocess.Popen(
            command,
            cwd=work,  # `python -m ninja` would import a ninja.py from the current folder
            env={**os.environ, "LC_ALL": "C"},  # messages are recognised in English
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                if verbose and (text := echo.read()):
                    say(text.rstrip("\n"))
                if process.returncode is not None:
                    return process.returncode
                if end is not None and time.monotonic() > end:
                    return None
        finally:
            if process.returncode is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and everything it has started: by SIGTERM, then
    SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2)
    # ninja gives each compiler its own process group, but all of them are in this session.
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            session = int(stat.read_text(errors="replace").rpartition(")")[2].split()[3])
            if session == process.pid:
                os.kill(int(stat.parent.name), signal.SIGKILL)
    process.kill()
    process.wait()


def _ninja_file(plans: Iterable[Plan]) -> str:
    def path(value: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def command(words: Iterable[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        "  command = $tool -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $tool -o $out $in $libraries",
    ]
    for plan in plans:
        objects = []
        for source, tool in plan.compile:
            objects.append(f"{plan.library}/{source.parent.name}-{source.stem}.o")
            lines += [f"build {objects[-1]}: compile {path(source)}", f"  tool = {command(tool)}"]
        # Libraries follow the objects that need them.
        split = plan.link.index("-shared") + 1
        lines += [
            f"build {plan.file}: link {' '.join(objects)}",
            f"  tool = {command(plan.link[:split])}",
            f"  libraries = {command(plan.link[split:])}",
        ]
    return "\n".join(lines) + "\n"


def fingerprint(path: Path) -> dict[str, object]:
    """Return the size and the hash of a file, which detect a damaged library."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_path(library: Path) -> Path:
    """Return the path of the fingerprint of a library that was built ahead."""
    return library.with_name(f"{library.name}.json")


def build_ahead(csrc: Path, package: Path, work: Path) -> list[Path]:
    """Compile everything into the package folder and return the files placed there.

    PYADV_CUDA decides about the CUDA kernels. Each op library gets a file with its fingerprint.

    Raises:
        BuildError: If a library cannot be built.
    """
    torch = this_torch()
    plans = [plan_cpu(csrc, torch)]
    wanted = cuda_wanted()
    if wanted == "1" or (wanted == "auto" and torch.cuda and find_cuda()):
        plans.append(plan_cuda(csrc, torch))
    plans.append(plan_module(csrc, work, plans))
    leftover = package / "_ops_cuda.so"  # an earlier build may have left it
    for path in (leftover, manifest_path(leftover)):
        path.unlink(missing_ok=True)
    placed = []
    for plan, library in zip(plans, build(plans, work, verbose=True), strict=True):
        placed.append(package / library.name)
        # Replaced, not overwritten: a running process may have the old library mapped.
        os.replace(shutil.copy2(library, f"{placed[-1]}.new"), placed[-1])
        if plan.library != "module":
            manifest = manifest_path(placed[-1])
            manifest.write_text(json.dumps(fingerprint(placed[-1])))
            placed.append(manifest)
    return placed
