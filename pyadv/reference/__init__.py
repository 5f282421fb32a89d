"""The specification: every op of `pyadv.ops` under the same name, in plain PyTorch."""

from pyadv.reference.geometry import track
from pyadv.reference.noise import keyed_normal, keyed_uniform, row_hash
from pyadv.reference.steps import linf_step

__all__ = [
    "linf_step",
    "track",
    "keyed_uniform",
    "keyed_normal",
    "row_hash",
]
