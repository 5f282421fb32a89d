"""The report of the checks for gradient masking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyadv.evaluation.escaping import markdown
from pyadv.evaluation.masking_statistics import OTHER_LOSS, smallest_difference
from pyadv.menus import Norm

OK, SUSPICIOUS, NOT_RUN = "ok", "suspicious", "not run"


@dataclass(frozen=True)
class Check:
    """The outcome of one comparison.

    Attributes:
        name: name of the check.
        verdict: "ok", "suspicious" or "not run".
        text: a sentence that says what was compared, and what a suspicious outcome means or why the
            check was not run.
        fault: what a suspicious outcome means; empty otherwise.
        numbers: the values compared, shares of all samples in [0, 1].
    """

    name: str
    verdict: str
    text: str
    fault: str
    numbers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class MaskingReport:
    """The checks of `n` samples at radius `eps` of `norm`.

    `curves` holds robust accuracy in [0, 1] as (value, accuracy) pairs, by "steps" and by "eps",
    both from 0, which gives the clean accuracy. `queries` and `gradients` are the mean numbers of
    forward and backward passes per sample.
    """

    n: int
    norm: Norm
    eps: float
    checks: tuple[Check, ...]
    curves: dict[str, list[tuple[float, float]]]
    queries: float
    gradients: float

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(check.name for check in self.checks)
        raise KeyError(f"no check {name!r}; there are {names}")

    @property
    def masked(self) -> bool:
        """Whether a check is suspicious."""
        return any(check.verdict == SUSPICIOUS for check in self.checks)

    @property
    def summary(self) -> str:
        """One line: what looks masked and why."""
        ran = [check for check in self.checks if check.verdict != NOT_RUN]
        found = [check for check in ran if check.verdict == SUSPICIOUS]
        if not found:
            seen = f"{100 * smallest_difference(self.n, OTHER_LOSS):.0f} points"
            return (
                f"Nothing looks masked: {len(ran)} of {len(self.checks)} checks ran, all ok; with "
                f"{self.n:,} samples another loss would have to break {seen} more to be noticed."
            )
        why = "; ".join(f"{check.fault} ({check.name})" for check in found)
        return f"Looks masked, by {len(found)} of {len(ran)} checks: {why}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "norm": self.norm,
            "eps": self.eps,
            "masked": self.masked,
            "summary": self.summary,
            "checks": [check.to_dict() for check in self.checks],
            "curves": {k: [list(point) for point in v] for k, v in self.curves.items()},
            "queries": self.queries,
            "gradients": self.gradients,
        }

    def to_markdown(self) -> str:
        """Return the summary and a table of the checks."""
        rows = (f"| {markdown(c.name)} | {c.verdict} | {markdown(c.text)} |" for c in self.checks)
        head = "| check | verdict | what was compared |", "|---|---|---|"
        return "\n".join((markdown(self.summary), "", *head, *rows))

    def __str__(self) -> str:
        lines = [f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}", self.summary]
        return "\n".join(lines + [f"{c.name:<14}{c.verdict:<12}{c.text}" for c in self.checks])


def judged(name: str, compared: str, fault: str, wrong: Any, numbers: dict[str, float]) -> Check:
    """Return a check that ran: `compared` says what, `fault` what it means if `wrong`."""
    if wrong:
        return Check(name, SUSPICIOUS, f"{compared}: {fault}.", fault, numbers)
    return Check(name, OK, f"{compared}.", "", numbers)


def not_run(name: str, reason: str) -> Check:
    """Return a check that did not run."""
    return Check(name, NOT_RUN, f"{reason}.", "", {})
