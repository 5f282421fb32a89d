"""Names and titles that users chose, as text in Markdown and in pictures."""

from __future__ import annotations

import re

# What has a meaning within a line, and what has one at its beginning.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&]|^[#+=-])")


def one_line(text: str) -> str:
    """Return the text without line breaks and other characters that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def markdown(text: str) -> str:
    """Return Markdown that is shown as `text`, on one line, also inside a table."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Return a Markdown code span that is shown as `text`, on one line."""
    text = one_line(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def in_picture(text: str) -> str:
    """Return the text for matplotlib, which reads $...$ as mathematics and leaves labels that begin
    with an underscore out of legends."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
