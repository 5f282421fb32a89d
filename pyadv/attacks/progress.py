"""How long work reports its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, int, int, int], None]
"""Called as (attack, samples done, samples it gets, samples that no attack has broken so far)."""


class Lines:
    """A printer of progress on stderr: one line per attack, rewritten after each batch on a
    terminal, with the share of samples that are not broken and the time since the first line. A
    stderr that is closed or cannot show a name never stops the attack.

    Args:
        log: a file that the finished lines are appended to as well.
        samples: how many there are, for the share; None shows none.
    """

    def __init__(self, log: str | Path | None = None, samples: int | None = None):
        self.log, self.samples = log, samples
        self._start: float | None = None

    def __call__(self, name: str, done: int, total: int, standing: int) -> None:
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        name = " ".join(name.split())  # a name may hold line breaks
        text = f"{name:<10}{done:>7} / {total}   not broken so far: {standing}"
        if self.samples:
            text += f" ({100 * standing / self.samples:.2f} %)"
        text += f"   {now - self._start:.1f} s"
        last = done == total
        _to_stderr(text, last)
        if last and self.log is not None:
            with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
                print(text, file=file)


def _to_stderr(text: str, last: bool) -> None:
    stream = sys.stderr
    if stream is None:  # the process was started without one
        return
    try:
        live = stream.isatty()
        if not (live or last):
            return
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(("\r" if live else "") + text, end="\n" if last else "", file=stream, flush=True)
    except (OSError, ValueError):  # closed, or its reader is gone
        pass
