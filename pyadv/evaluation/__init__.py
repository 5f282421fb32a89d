"""Robust accuracy and its report, checks for gradient masking, and margins."""

from pyadv.evaluation.bisection import Bisection
from pyadv.evaluation.curves import accuracy_curves
from pyadv.evaluation.document import BUDGET, Document, run_suite
from pyadv.evaluation.estimate import estimate
from pyadv.evaluation.evaluate import AUTOATTACKS, SUITES, evaluate, standard_attacks
from pyadv.evaluation.lipschitz import LipschitzBound, NotCovered, lipschitz_bound
from pyadv.evaluation.margins import Margins, margin_attacks, measure_margins
from pyadv.evaluation.masking import check_masking
from pyadv.evaluation.masking_report import Check, MaskingReport
from pyadv.evaluation.normalized_margins import effective_margin, spectrally_normalized_margin
from pyadv.evaluation.report import Report, Row

__all__ = [
    "AUTOATTACKS",
    "BUDGET",
    "SUITES",
    "Bisection",
    "Check",
    "Document",
    "LipschitzBound",
    "Margins",
    "MaskingReport",
    "NotCovered",
    "Report",
    "Row",
    "accuracy_curves",
    "check_masking",
    "effective_margin",
    "estimate",
    "evaluate",
    "lipschitz_bound",
    "margin_attacks",
    "measure_margins",
    "run_suite",
    "spectrally_normalized_margin",
    "standard_attacks",
]
