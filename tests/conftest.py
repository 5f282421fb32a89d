"""Devices and seeds of all tests, and a header that says which kernels the run tests."""

from __future__ import annotations

import os

import pytest
import torch

from pyadv import _native

# A library of CUDA kernels compiled for the CPU (tests/cuda_on_cpu). In this run they process CPU
# tensors.
_CUDA_ON_CPU = os.environ.get("PYADV_TEST_CUDA_ON_CPU")
if _CUDA_ON_CPU:
    torch.ops.load_library(_CUDA_ON_CPU)


def pytest_sessionstart(session: pytest.Session) -> None:
    # With PYADV_NATIVE=1 the run stops here if the native kernels do not load.
    try:
        _native.load()
    except _native.NativeError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.INTERNAL_ERROR)


def pytest_report_header() -> list[str]:
    if _CUDA_ON_CPU:
        return ["pyadv backend: CUDA kernels on the CPU shim, sanitized"]
    now = _native.status()
    rows = [("CPU", now.cpu), ("CUDA", now.cuda)]
    found = "CPU and CUDA" if torch.cuda.is_available() else "CPU (no CUDA device here)"
    first = f"pyadv backend: {now.backend}, torch {torch.__version__}, tested on: {found}"
    return [first] + [
        f"pyadv {name} kernels: {_native.describe(kernels)}" for name, kernels in rows
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


_DEVICES = ["cpu"]
if torch.cuda.is_available():
    _DEVICES.append(pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each available device in turn; the header of the run names them."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's generator, so that a test does not depend on the tests that ran before it."""
    torch.manual_seed(0)
