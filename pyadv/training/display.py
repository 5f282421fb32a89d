"""What a run shows: a progress bar on a terminal, one line per epoch everywhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pyadv.evaluation import Report


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


class Display:
    """Shows a run on `console`; with `quiet` it shows nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.console.quiet = self.console.quiet or quiet

    def progress(self) -> Progress:
        """A bar that leaves no trace; `fields[text]` stands at its end."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def message(self, text: str) -> None:
        # Not wrapped: paths and commands in it are copied.
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """The line that stays of an epoch."""
        parts = [
            f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}",
            f"loss {record['loss']:.3f}",
            f"train clean {percent(record['train_clean'])}",
            f"robust {percent(record['train_robust'])}",
        ]
        if record["val_robust"] is not None:
            parts.append(
                f"held-out clean {percent(record['val_clean'])} "
                f"robust {percent(record['val_robust'])}"
            )
        self.message("  ".join([*parts, f"{record['seconds']:.1f} s"]))


def report_table(report: Report, title: str) -> Table:
    """The table that ends a run."""
    table = Table(
        title=title,
        caption=f"{report.n:,} samples, {report.norm}, eps {report.eps:.4g}; ± standard error",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("accuracy %")
    table.add_column("attack")
    for row in (*report.rows, report.worst):
        style = "bold" if row.name == report.worst.name else None
        table.add_row(
            row.name,
            f"{100 * row.accuracy:6.2f} ± {100 * row.standard_error:.2f}",
            row.description,
            style=style,
        )
    return table
