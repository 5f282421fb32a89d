"""Robust accuracy and the report that states it, and signs of masking."""

from pyadv.evaluation.evaluate import AUTOATTACKS, SUITES, evaluate, standard_attacks
from pyadv.evaluation.masking import Check, MaskingReport, check_masking
from pyadv.evaluation.report import Report, Row

__all__ = [
    "AUTOATTACKS",
    "SUITES",
    "Check",
    "MaskingReport",
    "Report",
    "Row",
    "check_masking",
    "evaluate",
    "standard_attacks",
]
