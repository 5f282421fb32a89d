"""What an evaluation found: one row per attack, and the worst case over all of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyadv.attacks.ensemble import Findings


@dataclass(frozen=True)
class Row:
    """One attack's outcome: which samples it left correctly classified, (N,) bool, and how many
    forward passes (`queries`) and backward passes (`gradients`) each cost, (N,) int64. Of attacks
    that got only what the rows above left standing, the outcome of all so far."""

    name: str
    description: str
    correct: Tensor = field(repr=False)
    queries: Tensor = field(repr=False)
    gradients: Tensor = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Share of correctly classified samples, in [0, 1]."""
        return self.correct.double().mean().item()

    @property
    def standard_error(self) -> float:
        """Of `accuracy` as an estimate from N samples: sqrt(a (1 - a) / N)."""
        a = self.accuracy
        return math.sqrt(a * (1 - a) / len(self.correct))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "forward_passes_per_sample": self.queries.double().mean().item(),
            "backward_passes_per_sample": self.gradients.double().mean().item(),
        }


@dataclass(frozen=True)
class Report:
    """Rows of an evaluation of `n` samples at radius `eps` of `norm`, clean accuracy first;
    `findings` has what is known of each sample, the adversarial examples among it."""

    n: int
    norm: str
    eps: float
    rows: tuple[Row, ...]
    findings: Findings = field(repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    @property
    def worst(self) -> Row:
        """Samples that nothing here broke: the figure to report as robust accuracy."""
        correct = torch.stack([row.correct for row in self.rows]).all(0)
        passes = (
            torch.stack([getattr(row, name) for row in self.rows]).sum(0)
            for name in ("queries", "gradients")
        )
        return Row("worst case", "correct under every row above", correct, *passes)

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in (*self.rows, self.worst)]
        return {"n": self.n, "norm": self.norm, "eps": self.eps, "rows": rows}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_markdown(self) -> str:
        """A table, the worst case last."""
        lines = [
            f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}; passes per sample.",
            "",
            "| | accuracy % | attack | forward | backward |",
            "|---|---|---|---|---|",
        ]
        for row in (*self.rows, self.worst):
            passes = (t.double().mean().item() for t in (row.queries, row.gradients))
            accuracy = f"{100 * row.accuracy:.2f} ± {100 * row.standard_error:.2f}"
            cells = (row.name, accuracy, row.description, *(f"{v:,.1f}" for v in passes))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{self.n:,} samples, {self.norm}, eps {self.eps:.4g}"]
        for row in (*self.rows, self.worst):
            lines.append(
                f"{row.name:<12}{100 * row.accuracy:6.2f} +- {100 * row.standard_error:.2f} %"
                f"   {row.description}"
            )
        return "\n".join(lines)
