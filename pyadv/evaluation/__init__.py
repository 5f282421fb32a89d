"""Robust accuracy, and the report that states it."""

from pyadv.evaluation.evaluate import describe, evaluate, standard_attacks
from pyadv.evaluation.report import Report, Row

__all__ = ["Report", "Row", "describe", "evaluate", "standard_attacks"]
