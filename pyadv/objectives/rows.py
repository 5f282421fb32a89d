"""Deprecated name of `pyadv.objectives.terms`."""

import warnings

from pyadv.objectives.terms import (  # noqa: F401
    MARTBCE,
    MARTKL,
    Mean,
    Scaled,
    Sum,
    clean_cross_entropy,
    cross_entropy,
    trades_kl,
)

warnings.warn(
    "pyadv.objectives.rows is now pyadv.objectives.terms; the old name goes in the next release",
    DeprecationWarning,
    stacklevel=2,
)
