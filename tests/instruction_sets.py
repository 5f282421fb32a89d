"""Runs tests of the ops on the CPU kernels that a processor without AVX-512, or without AVX2, gets:

python tests/instruction_sets.py avx2 tests/ops/test_losses.py [any pytest arguments]
python tests/instruction_sets.py none tests/ops/test_steps.py

The kernels must equal the reference with every instruction set, and those of lesser sets run on few
machines that have tests. The library takes the place of the usual one, in a folder under build/.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from cuda_on_cpu import shim

from pyadv import _build

# What __builtin_cpu_supports(n) is made to say. The name of AVX-512's parts begins with "avx512".
HAS = {"avx2": "(n[3] != '5')", "none": "(n[0] == 0)"}


def plan(has: str) -> _build.Plan:
    """Return the plan of the CPU kernels for a processor that has only these extensions."""
    usual = _build.plan_cpu(_build.source_root(), _build.this_torch())
    define = f"-D__builtin_cpu_supports(n)={HAS[has]}"
    return dataclasses.replace(
        usual,
        library=f"cpu_{has}",
        file=f"_ops_{has}.so",
        compile=tuple((path, (*words, define)) for path, words in usual.compile),
    )


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in HAS:
        sys.exit(__doc__)
    library = shim.build(plan(sys.argv[1]))
    variables = {**os.environ, "PYADV_TEST_CUDA_ON_CPU": str(library), "PYADV_NATIVE": "0"}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow"]
    os.chdir(Path(__file__).resolve().parents[1])
    os.execve(words[0], [*words, *sys.argv[2:]], variables)
