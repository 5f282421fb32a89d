"""Suggestions for names that are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, "" if none is near."""
    if not isinstance(name, str) or not name:
        return ""
    names, given = {str(k).lower(): str(k) for k in known}, name.lower()
    longer = [k for k in names if len(k) > 1 and (given.startswith(k) or k.startswith(given))]
    near = sorted(longer, key=len)[-1:] or difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
