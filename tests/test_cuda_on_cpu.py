"""The CUDA kernels pass the tests of the ops on the CPU simulator, under sanitizers, and the
simulator catches known mistakes. See docs/cuda-checks.md."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cuda_on_cpu import shim

from pyadv import _build

pytestmark = pytest.mark.build

# torch.compile does not depend on which kernels run, and Winograd convolution has no CUDA kernel.
_ELSEWHERE = ("test_compile.py", "test_convolution.py")
OP_TESTS = sorted(
    path.name
    for path in (shim.REPOSITORY / "tests" / "ops").glob("test_*.py")
    if path.name not in _ELSEWHERE
)

# The output that each faulty kernel of mistakes.cu must give, as a regular expression.
MISTAKES = {
    "no_barrier_after_write": "wrong values",
    "no_barrier_after_read": "wrong values",
    "shared_array_not_initialised": "wrong values",
    "dynamic_shared_not_initialised": "wrong values",
    "count_on_earlier_block": "wrong values",
    "dynamic_shared_overflow": "heap-buffer-overflow",
    "shared_array_overflow": "global-buffer-overflow|insufficient space",
    "read_past_the_end": "heap-buffer-overflow",
    "misaligned_access": "misaligned address",
    "index_overflow": "signed integer overflow",
    "return_before_shuffle": "for lane 5, which has returned",
    "caller_not_in_mask": "the calling lane is not in the mask",
    "source_not_in_mask": "shuffle from lane 20, not in the mask",
    "mask_beyond_the_block": "names lanes that the block does not have",
    "collectives_do_not_match": "waits at another warp collective",
    "masks_do_not_match": "for lane 16",
    "different_barriers": "meet at different barriers",
    "return_before_barrier": "127 of 128 threads wait at the barrier",
    "no_cluster_barrier_before_read": "wrong values",
    "no_cluster_barrier_before_return": "shared memory of a block that has returned",
    "one_block_skips_the_barrier": "which not all threads of the cluster reach",
    "no_such_block": "the cluster has no such block",
    "copy_not_waited_for": "wrong values",
}
RIGHT = (
    "right_barriers",
    "right_shared_arrays",
    "right_dynamic_shared",
    "right_collectives",
    "right_after_failure",
    "right_limits",
    "right_cluster",
    "right_copy",
)


@pytest.fixture(scope="module")
def mistakes() -> Path:
    compiler = _build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ("-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{_build.source_root()}")
    return shim.build(
        dataclasses.replace(
            shim.plan(),
            library="mistakes",
            file="mistakes.so",
            compile=tuple(shim.commands([shim.HERE / "mistakes.cu"], (*compiler, *flags))),
            link=(*compiler, "-shared", *shim.SANITIZE, *shim.LINK),
        )
    )


@pytest.mark.parametrize("name, said", [*MISTAKES.items(), *((name, "right") for name in RIGHT)])
def test_simulator_catches(mistakes: Path, name: str, said: str) -> None:
    run = f"import ctypes; ctypes.CDLL({str(mistakes)!r}).run({name.encode()!r})"
    done = subprocess.run(
        [sys.executable, "-S", "-c", run],
        env=shim.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    output = done.stdout + done.stderr
    assert re.search("^right$" if said == "right" else said, output), output


def test_each_version_of_the_kernels_is_tested_on_other_cases(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))

    def cases() -> list[str]:
        names = [f"test_steps.py::test_{i % 3}[{i}]" for i in range(300)]
        items = [SimpleNamespace(nodeid=name) for name in names]
        conftest._thin_out(config, items)
        return [item.nodeid for item in items]

    file = str(shim.REPOSITORY / "tests" / "conftest.py")
    conftest = next(
        plugin
        for plugin in pytestconfig.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == file
    )
    monkeypatch.setenv("PYADV_TEST_ONE_IN", "5")
    copy = shutil.copytree(_build.source_root(), tmp_path / "csrc")
    monkeypatch.setattr(_build, "source_root", lambda: copy)
    drawn = []
    for change in ("", "", "// another kernel\n"):
        with (copy / "cuda" / "norms.cu").open("a") as source:
            source.write(change)
        monkeypatch.setenv("PYADV_TEST_KEY", shim.plan().recipe["sources"])
        drawn.append(cases())
        assert 30 <= len(drawn[-1]) <= 100
        assert {name.partition("[")[0] for name in drawn[-1]} == {
            f"test_steps.py::test_{i}" for i in range(3)
        }
    assert drawn[0] == drawn[1]
    assert len({*drawn[0]} & {*drawn[2]}) < len(drawn[0]) / 2


# The files whose kernels have another form on cards without clusters.
ROW_TESTS = ["test_steps.py", "test_projections.py"]


@pytest.mark.parametrize("clusters, files", [("1", OP_TESTS), ("0", ROW_TESTS)])
def test_ops(clusters: str, files: list[str]) -> None:
    """Run one in five cases of the op tests on the simulator, with and without clusters."""
    paths = [f"tests/ops/{file}" for file in files]
    words, variables = shim.command(["-v", "-m", "not slow and not build", *paths])
    variables |= {"CUDA_ON_CPU_CLUSTERS": clusters, "PYADV_TEST_ONE_IN": "5"}
    done = subprocess.run(
        words, env=variables, cwd=shim.REPOSITORY, capture_output=True, text=True, timeout=900
    )
    assert "CUDA kernels on the CPU shim" in done.stdout, done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-6000:] + done.stderr[-6000:]
