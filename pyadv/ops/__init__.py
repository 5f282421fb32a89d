"""Fused ops. Each has a reference of the same name in `pyadv.reference`."""

from pyadv.ops.steps import linf_step

__all__ = ["linf_step"]
