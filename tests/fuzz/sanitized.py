"""Runs the search on CPU kernels that are compiled with AddressSanitizer and UBSan:

python tests/fuzz/sanitized.py [arguments of python -m tests.fuzz, by default: ops]

The library takes the place of the usual one, in a folder of its own under build/. A memory error or
undefined behaviour ends the worker, and is reported with its case. Tests of one file, as
`tests/cuda_on_cpu/shim.py` runs them on the CUDA kernels, work too:

python tests/fuzz/sanitized.py pytest tests/ops/test_steps.py
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_on_cpu import shim  # noqa: E402

from pyadv import _build  # noqa: E402


def plan() -> _build.Plan:
    """The CPU library with the sanitizers. The clones for wider vectors stay: their loads and
    stores are looked at like others."""
    usual = _build.plan_cpu(_build.source_root(), _build.this_torch())
    return dataclasses.replace(
        usual,
        library="sanitized_cpu",
        file="_ops_sanitized.so",
        compile=tuple((path, (*words, *shim.SANITIZE)) for path, words in usual.compile),
        link=(*usual.link, *shim.SANITIZE),
    )


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["ops"]
    library = shim.build(plan())
    variables = {**shim.environment(), "PYADV_TEST_CUDA_ON_CPU": str(library)}
    module = [] if arguments[0] == "pytest" else ["tests.fuzz"]
    os.chdir(shim.REPOSITORY)
    os.execve(sys.executable, [sys.executable, "-m", *module, *arguments], variables)
