"""Robust accuracy, and the report that states it."""

from pyadv.evaluation.evaluate import AUTOATTACKS, SUITES, evaluate, standard_attacks
from pyadv.evaluation.report import Report, Row

__all__ = ["AUTOATTACKS", "SUITES", "Report", "Row", "evaluate", "standard_attacks"]
