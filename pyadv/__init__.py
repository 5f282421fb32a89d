"""Adversarial training and robustness evaluation with fused C++/CUDA kernels for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyadv import attacks, objectives, ops, reference
from pyadv._native import build
from pyadv._version import __version__

if TYPE_CHECKING:
    from pyadv.evaluation.evaluate import evaluate

__all__ = ["__version__", "attacks", "build", "evaluate", "objectives", "ops", "reference"]


def __getattr__(name: str) -> Any:
    """Import the evaluation at its first use: a training loop does without it."""
    if name not in ("evaluate", "evaluation"):
        raise AttributeError(f"module 'pyadv' has no attribute {name!r}")
    evaluation = importlib.import_module("pyadv.evaluation")
    globals().update(evaluation=evaluation, evaluate=evaluation.evaluate)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
