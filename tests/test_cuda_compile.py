"""Compiles the CUDA kernels, without a GPU: no warnings, no spills, 16-byte accesses, exact
arithmetic, and a library that PyTorch loads. See docs/cuda-checks.md.

One architecture takes minutes. After a change of a kernel, check all:

    PYADV_TEST_CUDA_ARCHITECTURES="8.0;9.0" python -m pytest tests/test_cuda_compile.py
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyadv import _build

CSRC = _build.source_root()
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = os.environ.get("PYADV_TEST_CUDA_ARCHITECTURES", "9.0")
STRICT = ("--Werror", "all-warnings", "-Xcompiler=-Werror", "-Xptxas", "-v")

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(_build.find_cuda() is None, reason="no nvcc found"),
]


@dataclass
class Usage:
    """Resources of one kernel on one architecture."""

    kernel: str
    architecture: str
    stack: int
    spills: int
    registers: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library with warnings as errors; build.log is beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        plan = _build.plan_cuda(CSRC, _build.this_torch())
    if plan.problem:
        pytest.skip(plan.problem)
    work = tmp_path_factory.mktemp("cuda")
    kept = ("--keep", f"--keep-dir={work}")  # the PTX, among others
    strict = tuple(
        (path, (*words, *((*STRICT, *kept) if path.suffix == ".cu" else ("-Werror",))))
        for path, words in plan.compile
    )
    return _build.build([dataclasses.replace(plan, compile=strict)], work)[0]


@pytest.fixture(scope="module")
def usage(library: Path) -> list[Usage]:
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        (library.parent / "build.log").read_text(),
    )
    return [
        Usage(kernel, architecture, int(stack), int(stores) + int(loads), int(registers))
        for kernel, architecture, stack, stores, loads, registers in found
    ]


def test_all_kernels_are_compiled_for_every_architecture(
    usage: list[Usage], ptx: dict[str, str]
) -> None:
    expected = {f"sm_{name.replace('.', '')}" for name in ARCHITECTURES.split(";")}
    assert {u.architecture for u in usage} == expected
    assert len(usage) == len(expected) * len(ptx)


def test_registers_suffice(usage: list[Usage]) -> None:
    """No kernel uses local memory, and at least 512 threads fit on a multiprocessor."""
    for u in usage:
        print(f"{u.architecture} {u.registers:3} registers  {u.kernel}")
    assert [u for u in usage if u.stack or u.spills] == []
    assert [u for u in usage if u.registers > 128] == []


@pytest.fixture(scope="module")
def ptx(library: Path) -> dict[str, str]:
    """Return the PTX body of every kernel, for the last of the architectures, by its mangled
    name."""
    bodies = {}
    for source in SOURCES:
        # With several architectures nvcc puts theirs into the names: steps.compute_90.ptx.
        file = sorted(library.parent.glob(f"{source.stem}.*ptx"))[-1]
        found = re.findall(r"\.entry (\w+)\((.*?)\n\}", file.read_text(), re.DOTALL)
        assert found, f"{source} has no kernel"
        bodies |= found
    return bodies


def test_vector_kernels_access_16_bytes(ptx: dict[str, str]) -> None:
    """A kernel <T, V, ...> with V elements per access loads and stores 16 bytes at once. A hash
    is one number per row: its kernel only loads."""
    vector = {
        name: body
        for name, body in ptx.items()
        if (found := re.search(r"[fdE]Li(\d+)E", name)) and int(found[1]) > 1
    }
    assert vector
    for name, body in vector.items():
        for access in ("ld",) if "row_hash_kernel" in name else ("ld", "st"):
            assert re.search(rf"{access}\.global(\.nc)?\.v(4\.[fbu]32|2\.[fbu]64)", body), name


def test_arithmetic_is_not_contracted(ptx: dict[str, str]) -> None:
    """A multiplication and an addition round separately, as in the reference. The losses need not
    equal the reference bit for bit, and the device functions they call contract."""
    exact = {name: body for name, body in ptx.items() if "_losses_cu_" not in name}
    assert exact
    assert [name for name, body in exact.items() if "fma.rn.f32" in body] == []


def test_library_loads_without_cuda_and_serves_every_op(library: Path) -> None:
    check = """
import sys, torch
import pyadv.ops
from pyadv.ops.registry import _LIBRARY
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = {name for name in _LIBRARY._op_defs if not has(name, "CUDA")}
expected = {"pyadv::winograd_weight", "pyadv::winograd"}  # cuDNN has its own
sys.exit(f"no CUDA kernel: {sorted(missing)}" if missing != expected else 0)
"""
    runtime = _build.find_cuda() / "lib64"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(runtime), "PYADV_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", check, library], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
