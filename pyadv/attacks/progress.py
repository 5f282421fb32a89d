"""How long work reports its progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int, int], None]
"""Called as (attack, samples done, samples it gets, samples that no attack has broken so far)."""

EVERY = 10.0  # seconds between lines where there is no terminal


class Lines:
    """A printer of progress on stderr, with the share of samples that are not broken and the time
    since the first line. On a terminal there is one line per attack, rewritten after each batch;
    elsewhere one line per attack and one every ten seconds between batches. A stderr that is closed
    or cannot show a name never stops the attack.

    Args:
        log: a file that the finished lines are appended to as well.
        samples: how many there are, for the share; None shows none.
    """

    def __init__(self, log: str | Path | None = None, samples: int | None = None):
        self.log, self.samples = log, samples
        self._start: float | None = None
        self._printed = 0.0

    def __call__(self, name: str, done: int, total: int, standing: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = self._printed = now
        name = " ".join(name.split())  # a name may hold line breaks
        text = f"{name:<10}{done:>7} / {total}   not broken so far: {standing}"
        if self.samples:
            text += f" ({100 * standing / self.samples:.2f} %)"
        text += f"   {now - self._start:.1f} s"
        last = done == total
        live = _is_terminal()
        if live or last or now - self._printed >= EVERY:
            to_stderr(("\r" if live else "") + text, end="" if live and not last else "\n")
            self._printed = now
        if last and self.log is not None:
            with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
                print(text, file=file)


class Watch:
    """A printer of progress on stderr for work without a terminal: a line every few seconds, also
    while a batch takes longer. It is a context manager that runs a thread, and a `Progress`.

    Args:
        expected: seconds that the work is expected to take; None for no expectation.
        every: seconds between lines.
    """

    def __init__(self, expected: float | None = None, every: float = EVERY):
        self.expected, self.every = expected, every
        self._now: tuple[str, int, int, int] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._start = time.monotonic()

    def __call__(self, name: str, done: int, total: int, standing: int) -> None:
        self._now = (name, done, total, standing)

    def __enter__(self) -> Watch:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            to_stderr(self.line(time.monotonic() - self._start))

    def line(self, elapsed: float) -> str:
        """Return the line that is printed after `elapsed` seconds."""
        text = "no batch is complete yet"
        if self._now is not None:
            name, done, total, standing = self._now
            name = " ".join(name.split())
            text = f"{name}: {done} / {total} samples done, {standing} not broken so far"
        text += f"; {duration(elapsed)} gone"
        if self.expected is not None:
            left = self.expected - elapsed
            text += f", about {duration(left)} to go" if left > 0 else ", longer than expected"
        return text


def duration(seconds: float) -> str:
    """Return a time for people: "9 s", "2 min 30 s", "3 h 5 min"."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {left} s" if left else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError):  # closed
        return False


def to_stderr(text: str, end: str = "\n") -> None:
    """Print to stderr, which may be closed, be absent or lack characters."""
    stream = sys.stderr
    if stream is None:  # the process was started without one
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):  # closed, or its reader is gone
        pass
