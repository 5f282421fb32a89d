"""What all tests share: devices, seeds, and the guarantee that a run says which kernels it tested."""

from __future__ import annotations

import pytest
import torch

from pyadv import _native


def pytest_sessionstart(session: pytest.Session) -> None:
    # With PYADV_NATIVE=1 a run on the reference must not pass for a native one.
    try:
        _native.load()
    except _native.NativeError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.INTERNAL_ERROR)


def pytest_report_header() -> list[str]:
    now = _native.status()
    rows = [("CPU", now.cpu), ("CUDA", now.cuda)]
    return [f"pyadv backend: {now.backend}, torch {torch.__version__}"] + [
        f"pyadv {name} kernels: {_native.describe(kernels)}" for name, kernels in rows
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is; the CUDA tests are skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
