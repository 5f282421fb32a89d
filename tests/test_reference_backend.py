"""The op tests pass without kernels: schemas, fakes, gradients and checks do not need them. A part
of the cases stands for all; `PYADV_NATIVE=0 python -m pytest tests/ops` runs all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPS = Path(__file__).parent / "ops"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("PYADV_NATIVE") == "0", reason="this run is on the reference")
def test_the_op_suite_passes_on_the_reference():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(OPS)],
        cwd=OPS.parent.parent,
        env={**os.environ, "PYADV_NATIVE": "0", "PYADV_TEST_ONE_IN": "4"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "pyadv backend: reference" in done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
