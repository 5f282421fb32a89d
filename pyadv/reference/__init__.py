"""The specification: every op of `pyadv.ops` under the same name, in plain PyTorch."""

from pyadv.reference.geometry import track
from pyadv.reference.noise import keyed_normal, keyed_uniform, row_hash
from pyadv.reference.projections import l1_project, l2_project, linf_project
from pyadv.reference.steps import (
    keep_rows_,
    l1_step,
    l2_momentum_step,
    l2_step,
    linf_momentum_step,
    linf_step,
)

__all__ = [
    "linf_step",
    "l2_step",
    "l1_step",
    "linf_momentum_step",
    "l2_momentum_step",
    "keep_rows_",
    "linf_project",
    "l2_project",
    "l1_project",
    "track",
    "keyed_uniform",
    "keyed_normal",
    "row_hash",
]
