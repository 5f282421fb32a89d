"""Build the CUDA kernels for the CPU (see README.md) and run op tests on them:

python tests/cuda_on_cpu/shim.py tests/ops/test_steps.py [any pytest arguments]
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyadv import _build

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
WORK = REPOSITORY / "build" / "cuda_on_cpu"

SANITIZE = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Compiles as plain C++, with the replacements included first. Each __shared__ variable gets its own
# section.
AS_CPP = (
    f"-include{HERE / 'cuda_on_cpu.h'}",
    "-fdata-sections",
    "-Wno-unknown-pragmas",
    "-x",
    "c++",
)
LINK = (f"-Wl,-T,{HERE / 'shared_memory.ld'}",)


def commands(sources: Sequence[Path], host: Sequence[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """Return each source and the simulator with its command; `host` is the command for host C++."""
    kernels = [
        (path, (*host, *SANITIZE, *(AS_CPP if path.suffix == ".cu" else ("-DPYADV_CUDA_ON_CPU",))))
        for path in sources
    ]
    return [*kernels, (HERE / "simulator.cpp", (*host, "-O2", "-g"))]


def plan() -> _build.Plan:
    """Return the plan of the sanitized CUDA kernels, as kernels for CPU tensors."""
    csrc, torch = _build.source_root(), _build.this_torch()
    cuda, cpu = _build.plan_cuda(csrc, torch), _build.plan_cpu(csrc, torch)
    host = next(command for path, command in cuda.compile if path.suffix == ".cpp")
    return dataclasses.replace(
        cpu,
        library="cuda_on_cpu",
        file="_ops_cuda_on_cpu.so",
        recipe=cuda.recipe,
        compile=tuple(commands([path for path, _ in cuda.compile], host)),
        link=(*cpu.link, *SANITIZE, *LINK),
    )


def build(what: _build.Plan) -> Path:
    """Compile changed files and return the library; processes take turns."""
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build.build([what], WORK / what.library)[0]


def environment() -> dict[str, str]:
    """Return the environment in which an unsanitized Python can load a sanitized library."""
    compiler = _build.find_compiler()
    # AddressSanitizer needs libstdc++ loaded first, to find the function that throws.
    preload = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYADV_NATIVE": "0",
    }


def command(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of a pytest run on the CPU build of the CUDA kernels.

    A run of a part of the cases chooses them by the hash of the kernels' sources, among others.
    """
    kernels = plan()
    library = build(kernels)
    return (
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        {
            **environment(),
            "PYADV_TEST_CUDA_ON_CPU": str(library),
            "PYADV_TEST_KEY": kernels.recipe["sources"],
        },
    )


if __name__ == "__main__":
    words, variables = command(["-m", "not slow", *sys.argv[1:]])
    os.chdir(REPOSITORY)
    os.execve(words[0], words, variables)
