"""The look of all pictures: colours that colour-blind readers tell apart (Okabe and Ito's), lines
that differ in print, and axes. Needs matplotlib."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

BLUE, RED, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, GOLD, GREY = "#cc79a7", "#e69f00", "#4a4a4a"

# Colours that differ for every reader are alike on a grey printer; dashes and markers are not.
_LINES = (
    (BLUE, "-", "o"),
    (RED, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (GOLD, (0, (5, 1, 1, 1, 1, 1)), "v"),
    (GREY, (0, (1, 1)), "x"),
)


def line(i: int) -> dict[str, Any]:
    """Return the colour, dashes and marker of the i-th line of a picture; they repeat after six."""
    colour, dashes, marker = _LINES[i % len(_LINES)]
    return {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4}


def plain(axes: Axes) -> None:
    """Draw two spines, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
