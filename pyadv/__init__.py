"""Adversarial training and robustness evaluation with fused C++/CUDA kernels for PyTorch."""

from pyadv import attacks, objectives, ops, reference
from pyadv._native import build
from pyadv._version import __version__
from pyadv.evaluation import evaluate

__all__ = ["__version__", "attacks", "build", "evaluate", "objectives", "ops", "reference"]
