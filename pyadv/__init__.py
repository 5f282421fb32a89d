"""Adversarial training and robustness evaluation with fused C++/CUDA kernels for PyTorch."""

from pyadv import ops, reference

__all__ = ["ops", "reference"]
