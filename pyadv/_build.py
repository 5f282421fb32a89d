"""What is compiled and how: sources, flags, the content key, the ninja file.

`setup.py` uses this ahead of time and `pyadv._native` at the first use, so both build the same
libraries. Only the standard library is imported at the top: `setup.py` loads this file by its path
where PyTorch may not be installed.
"""

from __future__ import annotations

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
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The oldest PyTorch that the kernels load into: they use its stable ABI, which later ones keep.
TARGET = (2, 11)

# Kernels must equal the reference bit for bit on every machine: no contraction to FMA, no
# fast-math, no -march (wider vectors are clones chosen at run time), and CXXFLAGS is not read.
HOST_FLAGS = (
    "-O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -fno-trapping-math -fno-math-errno"
    f" -Wall -Wextra -DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000"
).split()
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
DEFAULT_ARCHITECTURES = ("8.0", "9.0+PTX")

# Which files belong to which library; csrc/common and csrc/glue belong to both.
_ONLY_CPU = ("cpu/", "ops_cpu.cpp")
_ONLY_CUDA = ("cuda/", "ops_cuda.cpp")
_ONLY_MODULE = ("module.cpp",)
_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


class BuildError(RuntimeError):
    """A library was not built; the message says why and what would help."""


def choice(name: str, values: Sequence[str]) -> str:
    """The environment variable `name`, by default the first of `values`; else ValueError."""
    value = os.environ.get(name, "") or values[0]
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}; got {value!r}")
    return value


def cuda_wanted() -> str:
    """PYADV_CUDA: "auto" (where nvcc and a PyTorch with CUDA are), "0" (never) or "1" (always)."""
    return choice("PYADV_CUDA", ("auto", "0", "1"))


def source_root() -> Path:
    """The folder of C++ sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_csrc", package.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError(f"the C++ sources are missing: neither {package / '_csrc'} nor a checkout")


# Tools


@dataclass(frozen=True)
class Torch:
    """The PyTorch to compile against."""

    version: str
    cuda: str | None
    root: Path

    @property
    def standard(self) -> str:
        """The C++ standard its headers ask for; our own sources are clean C++17."""
        release = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        return "-std=c++20" if release >= (2, 13) else "-std=c++17"


def this_torch() -> Torch:
    """The PyTorch that `import torch` gives."""
    import torch

    return Torch(str(torch.__version__), torch.version.cuda, Path(torch.__file__).resolve().parent)


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command: CXX if set (and nothing else then), or the first on PATH."""
    named = os.environ.get("CXX", "").strip()
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if all(shutil.which(word) for word in words if not word.startswith("-")):
            return words
    return None


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder: the first with an nvcc and a runtime library."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    found = [Path(on_path).resolve().parent.parent] if on_path else []
    for home in [*(Path(name) for name in named if name), *found, Path("/usr/local/cuda")]:
        if os.access(home / "bin" / "nvcc", os.X_OK) and _cuda_runtime(home):
            return home
    return None


def find_ninja() -> list[str] | None:
    """ninja as a command: the Python package, which needs no PATH, or the program."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja")
    return [program] if program else None


@functools.lru_cache
def identity(*command: str) -> str:
    """What a compiler calls itself, without its path."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc puts its version in line 4
    return " ".join(release or lines[:1]) or f"unknown ({shlex.join(command)} --version failed)"


@functools.lru_cache
def visible_cards() -> tuple[str, ...]:
    """Compute capabilities of the visible cards, such as ("9.0",). Asks the driver, which needs
    neither PyTorch nor a context on a card."""
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
        for value, attribute in (
            (major, 75),
            (minor, 76),
        ):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        cards.add((major.value, minor.value))
    return tuple(f"{major}.{minor}" for major, minor in sorted(cards))


def architectures() -> tuple[str, ...]:
    """What the CUDA kernels are compiled for: TORCH_CUDA_ARCH_LIST, else the visible cards, else
    DEFAULT_ARCHITECTURES."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in named:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected forms like 9.0 or 9.0+PTX; got {name!r}"
            )
    return tuple(named) or visible_cards() or DEFAULT_ARCHITECTURES


def serves(compiled: Iterable[str], card: str) -> bool:
    """Whether kernels compiled for these architectures run on a card: same major version and no
    newer minor one, or any older PTX."""
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
    """One library: what decides its bytes, and the commands that make it.

    `recipe` and `tools` hold no path and no time, so equal content has an equal key everywhere.
    They are hashed apart: where a tool is missing, a library that another one built still serves.
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
    def seconds(self) -> int:
        """A rough guess of the build's wall time, for the line that the user reads."""
        work = sum(20 if source.suffix == ".cu" else 6 for source, _ in self.compile)
        return round(max(work / (os.cpu_count() or 1), 5))


def plan_cpu(csrc: Path, torch: Torch) -> Plan:
    """_ops.so: the CPU kernels."""
    files = _sources(csrc, without=_ONLY_CUDA + _ONLY_MODULE)
    compiler, problem = _compiler()
    recipe = _recipe(csrc, files, torch)
    return Plan(
        library="cpu",
        file="_ops.so",
        recipe=recipe,
        tools={"compiler": identity(*compiler) if compiler else "none"},
        compile=tuple((path, (*compiler, *_host_flags(csrc, torch))) for path in _units(files)),
        link=(*compiler, "-shared", *_link_flags(torch)),
        problem=problem,
    )


def plan_cuda(csrc: Path, torch: Torch) -> Plan:
    """_ops_cuda.so: the CUDA kernels. Only this library and only when loaded needs CUDA."""
    files = _sources(csrc, without=_ONLY_CPU + _ONLY_MODULE)
    compiler, problem = _compiler()
    names = architectures()
    home = find_cuda()
    nvcc, version, runtime = (), "none", ()
    if home is None:
        problem = "no CUDA toolkit (nvcc and libcudart) found: install one, or set CUDA_HOME"
    else:
        nvcc, runtime = (str(home / "bin" / "nvcc"),), (str(_cuda_runtime(home)),)
        version = identity(*nvcc)
        major = re.search(r"release (\d+)", version)
        # The library shares PyTorch's own CUDA runtime, which is one per major version.
        if torch.cuda and major and major[1] != torch.cuda.split(".")[0]:
            problem = f"{nvcc[0]} is CUDA {major[1]}, but PyTorch was built for CUDA {torch.cuda}"
    host = [f"-ccbin={word}" for word in compiler if not word.startswith("-")][-1:]
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
        tools={"compiler": identity(*compiler) if compiler else "none", "nvcc": version},
        compile=tuple(
            (path, device if path.suffix == ".cu" else (*compiler, *_host_flags(csrc, torch)))
            for path in _units(files)
        ),
        link=(*compiler, "-shared", *_link_flags(torch), *runtime),
        problem=problem,
    )


def plan_module(csrc: Path, work: Path, plans: Iterable[Plan]) -> Plan:
    """_C: a Python module that says how the libraries built ahead beside it were made."""
    info = json.dumps({plan.library: plan.info for plan in plans}, indent=1, sort_keys=True)
    header = work / "build_info.h"
    text = f'constexpr char kBuildInfo[] = R"json({info})json";\n'
    work.mkdir(parents=True, exist_ok=True)
    if not header.is_file() or header.read_text() != text:  # ninja looks at the time of change
        header.write_text(text)
    compiler, problem = _compiler()
    includes = [sysconfig.get_path("include")]
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is not None:
        includes.append(str(Path(pybind11.origin).parent / "include"))
    else:
        problem = problem or "compiling ahead needs pybind11: pip install pybind11 ninja"
    flags = (*HOST_FLAGS, "-std=c++17", f"-I{work}", *(f"-isystem{path}" for path in includes))
    return Plan(
        library="module",
        file="_C" + sysconfig.get_config_var("EXT_SUFFIX"),
        recipe={"python": sysconfig.get_config_var("SOABI")},
        tools={},
        compile=((csrc / "module.cpp", (*compiler, *flags)),),
        link=(*compiler, "-shared"),
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
    """The compiler, which also links, and why nothing can be built here."""
    if not sys.platform.startswith("linux"):
        return (), f"native kernels are built on Linux only, not on {sys.platform}"
    command = find_compiler()
    if command is None:
        named = os.environ.get("CXX", "").strip()
        seen = f"CXX={named} does not run" if named else "c++, g++ and clang++ are not on PATH"
        return (), f"no C++ compiler: {seen}; install one (Debian: apt-get install g++) or set CXX"
    if find_ninja() is None:
        return tuple(command), "ninja is missing: pip install ninja"
    return tuple(command), None


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
    # The prefix maps keep this machine's folders out of the library and its error messages.
    headers = torch.root / "include"
    maps = (f"-ffile-prefix-map={folder}/=" for folder in (csrc, headers))
    return (*HOST_FLAGS, torch.standard, f"-I{csrc}", f"-isystem{headers}", *maps)


def _link_flags(torch: Torch) -> tuple[str, ...]:
    # Undefined symbols become errors here instead of at load. PyTorch is loaded by then: no rpath.
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
    """libcudart by its path: linked shared, so that it is the one that PyTorch has loaded."""
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    return next((p for folder in folders for p in home.glob(f"{folder}/libcudart.so*")), None)


# Building


def build(
    plans: Sequence[Plan], work: Path, log: Path | None = None, *, verbose: bool = False
) -> list[Path]:
    """Compile the plans in `work` and return the libraries' paths, in order.

    Objects that an earlier build left in `work` are kept where nothing they depend on has changed.
    The output goes to `log` (by default `work`/build.log) and, with `verbose`, to stderr.
    Raises BuildError with the compiler's last lines.
    """
    for plan in plans:
        if plan.problem:
            raise BuildError(plan.problem)
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(_ninja_file(plans))
    command = [*(find_ninja() or ["ninja"]), "-C", str(work)]
    if jobs := os.environ.get("MAX_JOBS", "").strip():
        command += ["-j", jobs]
    if verbose:
        command += ["-v"]
    log = log or work / "build.log"
    tail: list[str] = []
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                tail = [*tail[-24:], line]
                if verbose:
                    sys.stderr.write(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise BuildError(f"compiling failed (log: {log}); its last lines:\n{''.join(tail)}")
    return [work / plan.file for plan in plans]


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


def build_ahead(csrc: Path, package: Path, work: Path) -> list[Path]:
    """Compile everything into the package folder, CUDA as PYADV_CUDA says; raises BuildError."""
    torch = this_torch()
    plans = [plan_cpu(csrc, torch)]
    wanted = cuda_wanted()
    if wanted == "1" or (wanted == "auto" and torch.cuda and find_cuda()):
        plans.append(plan_cuda(csrc, torch))
    plans.append(plan_module(csrc, work, plans))
    (package / "_ops_cuda.so").unlink(missing_ok=True)  # of an earlier build
    placed = []
    for library in build(plans, work, verbose=True):
        placed.append(package / library.name)
        # Replaced, not overwritten: a running process may have the old one mapped.
        os.replace(shutil.copy2(library, f"{placed[-1]}.new"), placed[-1])
    return placed
