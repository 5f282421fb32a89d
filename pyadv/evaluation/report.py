"""The report of an evaluation: one row per attack, and the worst case over all of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyadv._provenance import provenance as find_provenance
from pyadv.attacks.ensemble import Findings
from pyadv.evaluation.escaping import markdown, one_line
from pyadv.menus import Norm

_95_PERCENT = 1.959964  # standard errors


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's interval of a share that was observed in n samples, at 95 % confidence.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal
    of the American Statistical Association, 1927.
    """
    z2 = _95_PERCENT**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclass(frozen=True)
class Row:
    """The outcome of one attack. If attacks get only what the rows above left standing, it is the
    outcome of all attacks so far.

    Attributes:
        name: the attack's name.
        description: one line that lets a reader repeat the attack.
        correct: (N,) bool: the sample is classified correctly at x and under the attack.
        queries, gradients: (N,) int64 forward and backward passes.
        non_finite: (N,) bool: the attack reached logits with NaN or +inf, which counts as
            misclassified; None for none.
    """

    name: str
    description: str
    correct: Tensor = field(repr=False)
    queries: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)
    non_finite: Tensor | None = field(default=None, repr=False)

    @property
    def accuracy(self) -> float:
        """Share of correctly classified samples, in [0, 1]."""
        return self.correct.double().mean().item()

    @property
    def standard_error(self) -> float:
        """Standard error of `accuracy` as an estimate from N samples: sqrt(a (1 - a) / N)."""
        a = self.accuracy
        return math.sqrt(a * (1 - a) / len(self.correct))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of `accuracy` as an estimate from N samples, at 95 % confidence. It has
        a width also at accuracies of 0 and 1."""
        return wilson(self.accuracy, len(self.correct))

    @property
    def non_finite_count(self) -> int:
        """Number of samples for which the attack reached logits with NaN or +inf."""
        return 0 if self.non_finite is None else int(self.non_finite.sum())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "interval": list(self.interval),
            "forward_passes_per_sample": self.queries.double().mean().item(),
            "backward_passes_per_sample": self.gradients.double().mean().item(),
            "non_finite": self.non_finite_count,
        }


@dataclass(frozen=True)
class Report:
    """Rows of an evaluation of `n` samples at radius `eps` of `norm`, clean accuracy first.

    `findings` holds what is known of each sample, adversarial examples included; `notes` holds
    remarks that a reader of the numbers needs.
    """

    n: int
    norm: Norm
    eps: float
    rows: tuple[Row, ...]
    findings: Findings = field(repr=False)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def worst(self) -> Row:
        """The samples that no attack broke: the figure to report as robust accuracy."""
        correct = torch.stack([row.correct for row in self.rows]).all(0)
        queries = torch.stack([row.queries for row in self.rows]).sum(0)
        gradients = torch.stack([row.gradients for row in self.rows]).sum(0)
        found = [row.non_finite for row in self.rows if row.non_finite is not None]
        non_finite = torch.stack(found).any(0) if found else None
        words = "correct under every row above"
        return Row("worst case", words, correct, queries, gradients, non_finite)

    @property
    def remarks(self) -> list[str]:
        """The notes, and which attacks reached logits that are not finite."""
        counts = ((row.name, row.non_finite_count) for row in self.rows)
        return list(self.notes) + [
            f"{name} reached logits with NaN or +inf on {count:,} of {self.n:,} samples; they "
            "count as misclassified."
            for name, count in counts
            if count
        ]

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in (*self.rows, self.worst)]
        notes = list(self.notes)
        return {"n": self.n, "norm": self.norm, "eps": self.eps, "rows": rows, "notes": notes}

    def save(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write the report as JSON, with where it comes from under "provenance": by default this
        process and its command line."""
        made = find_provenance() if provenance is None else provenance
        content = {**self.to_dict(), "provenance": made}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def to_markdown(self) -> str:
        """Return a table, the worst case last."""
        lines = [
            f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}; passes per sample.",
            "",
            "| | accuracy % (95 % interval) | attack | forward | backward |",
            "|---|---|---|---|---|",
        ]
        for row in (*self.rows, self.worst):
            passes = (t.double().mean().item() for t in (row.queries, row.gradients))
            accuracy = with_interval(row)
            words = markdown(row.name), accuracy, markdown(row.description)
            lines.append(f"| {' | '.join((*words, *(f'{v:,.1f}' for v in passes)))} |")
        for remark in self.remarks:
            lines += ["", markdown(remark)]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}"]
        for row in (*self.rows, self.worst):
            lines.append(
                f"{one_line(row.name):<12}{with_interval(row, ' to '):>24} %   "
                f"{one_line(row.description)}"
            )
        return "\n".join(lines + self.remarks)


def with_interval(row: Row, to: str = "–") -> str:
    """Return the accuracy of a row in percent, with its interval."""
    low, high = row.interval
    return f"{100 * row.accuracy:.2f} ({100 * low:.2f}{to}{100 * high:.2f})"
