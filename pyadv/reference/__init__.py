"""The specification: every op of `pyadv.ops` under the same name, in plain PyTorch."""

from pyadv.reference.steps import linf_step

__all__ = ["linf_step"]
