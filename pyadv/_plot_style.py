"""Colours and axes of all pictures. Needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes

BLUE, RED, GREEN = "#2b6cb0", "#c53030", "#2f855a"
PURPLE, GOLD, GREY = "#6b46c1", "#b7791f", "#4a5568"


def plain(axes: Axes) -> None:
    """Draw two spines, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
