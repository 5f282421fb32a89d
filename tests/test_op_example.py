"""The op that docs/extending/op.md adds: its files are complete, compile and pass their tests."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pyadv import _build

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = runpy.run_path(str(REPOSITORY / "examples" / "op" / "add.py"))
PAGE = (REPOSITORY / "docs" / "extending" / "op.md").read_text()

BENCHMARK = """
import importlib, sys
import torch
sys.path.insert(0, "benchmarks")
from harness import Options
for question in ("ops", "gpu_kernels"):
    options = Options(torch.device("cpu"), threads=1, quick=True)
    cases = importlib.import_module(question).cases(options)
    case = next(case for case in cases if case.name.startswith("shrink"))
    problem = case.check(case.providers["pyadv"].call())
    assert problem is None, problem
"""


def test_page_names_every_file() -> None:
    files = {str(path) for path in EXAMPLE["new_files"]()}
    assert len(files) == 8
    files |= {name for name, _, _ in EXAMPLE["LINES"]}
    assert {name for name in files if f"`{name}`" not in PAGE} == set()


def test_page_shows_the_files_as_they_are() -> None:
    shown = re.findall(
        r"^`(examples/op/[^`]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE
    )
    assert len(shown) == 6
    for name, code in shown:
        assert code in (REPOSITORY / name).read_text(), name


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository with the op in it. Its kernels are all that the copy compiles; the
    other families' take minutes, and other tests compile them."""
    folder = tmp_path_factory.mktemp("tree")
    EXAMPLE["add"](folder)
    csrc = folder / "csrc"
    for file in (*csrc.glob("cpu/*.cpp"), *csrc.glob("cuda/*.cu")):
        if file.stem != "shrink":
            file.unlink()
    for name in ("ops_cpu.cpp", "ops_cuda.cpp"):
        lines = (csrc / name).read_text().splitlines(keepends=True)
        others = re.compile(r'#include "glue/(?!shrink)|  pyadv::register_(?!shrink)')
        (csrc / name).write_text("".join(line for line in lines if not others.match(line)))
        assert "register_shrink" in (csrc / name).read_text()
    return folder


def run(tree: Path, *words: str, **variables: str) -> str:
    """Run Python in the copy and return what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": ".", "PYADV_CACHE_DIR": str(tree / "cache"), **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.build
def test_native_and_reference(tree: Path) -> None:
    tests = ("-m", "pytest", "-p", "no:cacheprovider", "tests/ops/test_shrink.py")
    assert "backend: native" in run(tree, *tests, PYADV_NATIVE="1", PYADV_CUDA="0")
    assert "backend: reference" in run(tree, *tests, PYADV_NATIVE="0")
    run(tree, "-c", BENCHMARK, PYADV_NATIVE="1", PYADV_CUDA="0")


@pytest.mark.build
def test_cuda_kernel_on_the_cpu(tree: Path) -> None:
    if _build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert "CUDA kernels on the CPU shim" in run(
        tree, "tests/cuda_on_cpu/shim.py", "tests/ops/test_shrink.py"
    )


@pytest.mark.build
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_kernel_compiles(tree: Path, architecture: str, tmp_path: Path) -> None:
    cuda = _build.find_cuda()
    if cuda is None:
        pytest.skip("no nvcc found")
    flags = (*_build.NVCC_FLAGS, f"-I{tree / 'csrc'}", f"-arch={architecture}", "-Xptxas=-v")
    done = subprocess.run(
        [
            *(cuda / "bin" / "nvcc", *flags, "--Werror", "all-warnings"),
            *("-c", tree / "csrc" / "cuda" / "shrink.cu", "-o", tmp_path / "shrink.o"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}
