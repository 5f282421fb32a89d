"""Suggestions for names that are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, "" if none is near."""
    names = {str(k).lower(): str(k) for k in known}
    near = difflib.get_close_matches(str(name).lower(), names, n=1) if isinstance(name, str) else []
    return f"; did you mean {names[near[0]]!r}?" if near else ""
