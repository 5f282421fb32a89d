"""Fused ops. Each has a reference of the same name in `pyadv.reference`."""

from pyadv.ops.geometry import track
from pyadv.ops.noise import keyed_normal, keyed_uniform, row_hash
from pyadv.ops.steps import linf_step

__all__ = [
    "linf_step",
    "track",
    "keyed_uniform",
    "keyed_normal",
    "row_hash",
]
