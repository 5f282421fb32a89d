"""Draw the pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from pyadv._plot_style import BLUE, GREY, RED, plain

Records = list[dict[str, Any]]


def curves(records: Records, path: Path) -> None:
    """Draw the loss and the clean and robust accuracy over the epochs."""
    epochs = [r["epoch"] for r in records]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [r["loss"] for r in records], color=GREY, marker="o", markersize=4)
    left.set(xlabel="epoch", ylabel="objective", title="Training loss")
    for name, colour, style, marker, label in (
        ("train_clean", BLUE, "-", "o", "clean, training"),
        ("train_robust", RED, "-", "s", "under the training attack"),
        ("val_clean", BLUE, "--", "o", "clean, held out"),
        ("val_robust", RED, "--", "s", "under margin PGD, held out"),
    ):
        points = [(r["epoch"], 100 * r[name]) for r in records if r[name] is not None]
        if points:
            look = {"color": colour, "marker": marker, "markersize": 4}
            right.plot(*zip(*points, strict=True), style, label=label, **look)
    right.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        plain(axes)
        axes.xaxis.set_major_locator(_whole_epochs())
    figure.savefig(path, dpi=150)


def kappa(records: Records, path: Path) -> None:
    """Draw how many iterates of the training attack each training sample survived, over the epochs
    and in the last one.

    Near the decision boundary kappa is small (GAIRAT, Zhang et al. 2021).
    """
    counts = np.array([r["kappa"] for r in records], float)
    share = 100 * counts / counts.sum(1, keepdims=True)
    epochs = [r["epoch"] for r in records]
    values = np.arange(share.shape[1])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)

    # Most samples sit at both ends; a square-root scale keeps the values between visible.
    image = left.imshow(
        share.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        norm=PowerNorm(0.5, vmin=0, vmax=share.max()),
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, -0.5, len(values) - 0.5),
    )
    left.set(xlabel="epoch", ylabel="kappa: steps survived", title="All epochs")
    left.xaxis.set_major_locator(_whole_epochs())
    figure.colorbar(image, ax=left, label="% of training samples")

    right.bar(values, share[-1], color=BLUE, width=0.85)
    right.set(xlabel="kappa: steps survived", ylabel="% of training samples")
    right.set_title(f"Epoch {epochs[-1]}")
    right.set_xticks(values if len(values) <= 21 else values[:: len(values) // 10])
    edges = (0, "left", "fooled at every step"), (values[-1], "right", "correct at every step")
    for at, side, text in edges:
        edge = at + (0.43 if side == "right" else -0.43)
        right.text(edge, share[-1, at], f"{text}\n", ha=side, va="center", fontsize="small")
    right.margins(y=0.1)
    plain(right)
    layout = figure.get_layout_engine()
    if isinstance(layout, ConstrainedLayoutEngine):
        layout.set(wspace=0.08)
    figure.savefig(path, dpi=150)


def _whole_epochs() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1)
