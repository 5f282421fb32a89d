"""Adversarial training and robustness evaluation with fused C++/CUDA kernels for PyTorch."""

from pyadv import ops, reference
from pyadv._native import build
from pyadv._version import __version__

__all__ = ["__version__", "build", "ops", "reference"]
