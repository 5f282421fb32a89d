"""Devices and seeds of all tests, and a header that says which kernels the run tests."""

from __future__ import annotations

import os
import sys
import types
import zlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _thin_out(config, items)
    # Files that compile come first: two processes then end at about the same time.
    compiles = {item.path for item in items if "build" in item.keywords}
    items.sort(key=lambda item: item.path not in compiles)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


def _thin_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With PYADV_TEST_ONE_IN=n, keep the first case of each test function and one in n of the
    others. The hash of their names and of PYADV_TEST_KEY chooses them."""
    one_in = int(os.environ.get("PYADV_TEST_ONE_IN", 1))
    key = os.environ.get("PYADV_TEST_KEY", "")
    functions, kept, left_out = set(), [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        drawn = zlib.crc32(f"{key}{item.nodeid}".encode()) % one_in == 0
        chosen = function not in functions or drawn
        functions.add(function)
        (kept if chosen else left_out).append(item)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


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


class _TimmConfig(NamedTuple):
    fixed_input_size: bool


@pytest.fixture
def timm_stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install a module that stands for timm, and return the arguments of its last network."""
    seen: dict[str, Any] = {}

    def create_model(name: str, **settings: Any) -> nn.Module:
        seen.update(settings, name=name)
        channels, classes = settings["in_chans"], settings["num_classes"]
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    stub = types.ModuleType("timm")
    stub.create_model = create_model
    stub.is_model = lambda name: name in ("resnet50", "vit_tiny")
    stub.list_models = lambda: ["resnet50", "vit_tiny"]
    stub.get_pretrained_cfg = lambda name: _TimmConfig(name.startswith("vit"))
    monkeypatch.setitem(sys.modules, "timm", stub)
    return seen
