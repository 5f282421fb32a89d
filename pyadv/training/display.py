"""Progress of a run: a bar on a terminal, one line per epoch everywhere."""

from __future__ import annotations

import io
import sys
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pyadv.evaluation import Report
from pyadv.evaluation.escaping import one_line
from pyadv.evaluation.report import with_interval


def percent(value: float | None) -> str:
    """Return a share in percent with one decimal, "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


class Display:
    """Shows a run on `console`, by default on stderr; with `quiet` it shows nothing.

    A console that can no longer be written to (a closed pipe, a full disk, a terminal that has
    gone) goes silent, and characters that its encoding lacks are replaced: what is shown never
    stops a run.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.console.quiet = self.console.quiet or quiet
        if not isinstance(self.console.file, _SafeStream):
            # The stubs know the base classes of `io` as no IO[str].
            self.console.file = cast("IO[str]", _SafeStream(self.console.file))

    def progress(self) -> Progress:
        """Return a progress bar that is erased at its end and shows each task's `text`."""
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
        """Print one line, unwrapped, so that users can copy paths and commands."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Print the line that sums up an epoch."""
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


class _SafeStream(io.TextIOBase):
    """A text stream to `file` on which writing never fails.

    stdout and stderr are looked up at each write, since programs redirect them. After an error the
    stream is silent.
    """

    _SPELLED = {"–": "-", "—": "-", "…": "...", "→": "->"}

    def __init__(self, file: IO[str]) -> None:
        self._file, self._silent = file, False
        self._name = next((n for n in ("stdout", "stderr") if getattr(sys, n) is file), None)

    @property
    def _target(self) -> IO[str] | None:
        file = self._file if self._name is None else getattr(sys, self._name)
        return getattr(file, "rich_proxied_file", file)  # rich's own proxy would write to us

    # At run time the base has a property here too; its stub has an attribute.
    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._target, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        try:
            target = self._target
            return not self._silent and target is not None and target.isatty()
        except (AttributeError, ValueError, OSError):
            return False

    def fileno(self) -> int:
        if self._target is None:
            raise io.UnsupportedOperation("fileno")
        return self._target.fileno()

    def write(self, text: str) -> int:
        target = self._target
        if target is not None and not self._silent:
            try:
                target.write(self._encodable(text))
            except (OSError, ValueError):  # ValueError: it is closed
                self._silent = True
        return len(text)

    def flush(self) -> None:
        target = self._target
        if target is not None and not self._silent:
            try:
                target.flush()
            except (OSError, ValueError):
                self._silent = True

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            for sign, spelled in self._SPELLED.items():
                text = text.replace(sign, spelled)
            text = text.encode(self.encoding, "replace").decode(self.encoding)
        return text


def report_table(report: Report, title: str) -> Table:
    """Return the table of accuracies that ends a run."""
    table = Table(
        title=escape(title),
        caption=f"{report.n:,} samples, {report.norm}, eps {report.eps:.4g}; with 95 % intervals",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("accuracy %")
    table.add_column("attack")
    for row in (*report.rows, report.worst):
        style = "bold" if row.name == report.worst.name else None
        table.add_row(
            escape(one_line(row.name)),
            with_interval(row),
            escape(one_line(row.description)),
            style=style,
        )
    return table
