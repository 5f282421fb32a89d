"""Pictures of an evaluation; they need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter
from torch import Tensor

from pyadv._plot_style import BLUE, GOLD, GREEN, GREY, PURPLE, RED, line, plain
from pyadv.evaluation.escaping import in_picture
from pyadv.evaluation.margins import Margins

Points = Sequence[tuple[float, float]]

_ATTACKS = ((RED, "--"), (GREEN, "-."), (PURPLE, ":"))  # colours and dashes
_BINS = 40  # at most
_COLUMNS = 10  # examples in a picture


def margin_distributions(margins: Margins, path: str | Path) -> None:
    """Draw how the margins are spread, and the share of all samples whose margin exceeds a radius.

    That share is robust accuracy according to each measure: the true one lies between the
    certificate's and that of the nearest points found.

    Args:
        margins: margins that include a correctly classified sample.
        path: file of the picture; its ending selects the format.

    Raises:
        ValueError: no sample is classified correctly.
    """
    if not margins.correct.any():
        raise ValueError("margins must have a correctly classified sample, got none")
    columns = {name: values.double().numpy() for name, values in margins.columns.items()}
    *_, best = columns  # the nearest points; the estimate where there are no attacks
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_xlabel(f"{margins.norm} distance")
        plain(axes)

    correct = margins.correct.numpy()
    spread = {name: columns[name][correct] for name in dict.fromkeys((best, "effective"))}
    finite = [v[np.isfinite(v)] for v in spread.values()]
    ends = [np.quantile(v, 0.95) for v in finite if len(v)]
    end = min(max(ends), 3 * ends[0]) if ends and ends[0] > 0 else 1.0  # the estimate has a tail
    bins = min(_BINS, max(8, correct.sum() // 4))  # few samples in 40 bins make a comb
    for name, colour in zip(spread, (BLUE, GOLD), strict=False):
        counts, edges = np.histogram(spread[name], np.linspace(0, end, bins + 1))
        shares, style = 100 * counts / correct.sum(), "-" if name == best else "--"
        left.stairs(shares, edges, color=colour, linestyle=style, label=_label(name))
        if name == best:
            left.stairs(shares, edges, color=colour, fill=True, alpha=0.3)
    left.set(ylabel="% of the correct samples", title="How far the boundary is")
    left.legend(frameon=False, fontsize="small")

    positive = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in columns.values()])
    low, high = np.quantile(positive, (0.01, 0.995)) if len(positive) else (0.1, 1.0)
    radii = np.geomspace(low, max(high, 2 * low), 300)
    above = {
        name: 100 * (1 - np.searchsorted(np.sort(v), radii, "right") / len(v))
        for name, v in columns.items()
    }
    styles = _styles(columns, best)
    for name, shares in above.items():
        right.plot(radii, shares, label=_label(name), **styles[name])
    if "certified" in above:
        right.fill_between(radii, above["certified"], above[best], color=BLUE, alpha=0.08, lw=0)
    right.set(xscale="log", ylim=(0, 100), ylabel="% of all samples farther away")
    right.set_title("Robust accuracy at each radius")
    # The curves may lie anywhere in the axes.
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def accuracy_against(curves: Mapping[str, Points | Mapping[str, Points]], path: str | Path) -> None:
    """Draw accuracy against each varied setting, one panel per setting.

    Args:
        curves: setting ("eps", "steps") -> (value, accuracy in [0, 1]) pairs; or setting -> name of
            a line -> such pairs.
        path: file of the picture; its ending selects the format.

    Raises:
        ValueError: there is no curve, or one has no points.
    """
    panels = {x: c if isinstance(c, Mapping) else {"": c} for x, c in curves.items()}
    if not panels or not all(points for lines in panels.values() for points in lines.values()):
        raise ValueError("curves must hold at least one curve, each with a point")
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axes, (varied, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for i, (name, points) in enumerate(lines.items()):
            values, shares = zip(*sorted(points), strict=True)
            percent = [100 * s for s in shares]
            axes.plot(values, percent, label=in_picture(name), **line(i))
        axes.set(xlabel=in_picture(varied), ylabel="accuracy (%)", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if varied == "steps":
            _in_steps(axes, sorted({v for points in lines.values() for v, _ in points}))
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize="small")
        axes.set_title(f"Accuracy against {in_picture(varied)}")
        plain(axes)
    figure.savefig(path, dpi=150)


def worst_examples(
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    y_adv: Tensor,
    classes: Sequence[str],
    path: str | Path,
) -> None:
    """Draw one column per example, in the order given, at most 10: the clean image, the adversarial
    one, and their difference. The difference is magnified until its largest entry is black or
    white; grey stands for zero.

    Args:
        x, x_adv: (B, 1, H, W) grey or (B, 3, H, W) colour images in [0, 1].
        y, y_adv: (B,) int64 labels and predictions.
        classes: names of the classes.
        path: file of the picture; its ending selects the format.

    Raises:
        ValueError: no examples, shapes that do not fit, or images with other numbers of channels.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"x must be (B, 1, H, W) or (B, 3, H, W) with B >= 1, got {[*x.shape]}")
    if x_adv.shape != x.shape or not len(y) == len(y_adv) == len(x):
        raise ValueError(
            f"x_adv must have the shape of x, {[*x.shape]}, with a label y and a prediction y_adv "
            f"each, got {[*x_adv.shape]}, {len(y)} and {len(y_adv)}"
        )
    n = min(len(x), _COLUMNS)
    clean, adversarial = (
        t[:n].detach().double().cpu().permute(0, 2, 3, 1).numpy() for t in (x, x_adv)
    )
    difference = adversarial - clean
    size = np.abs(difference).max((1, 2, 3))
    shown = 0.5 + difference / np.where(size > 0, 2 * size, 1.0)[:, None, None, None]
    figure = Figure(figsize=(1.25 * n + 0.9, 4.6), layout="constrained")
    grid = figure.subplots(3, n, squeeze=False)
    names = [[_name(classes, int(k)) for k in labels[:n]] for labels in (y, y_adv)]
    titles = (
        *names,
        [f"x {0.5 / s:,.{1 if s > 0.05 else 0}f}" if s else "no change" for s in size],
    )
    words = ("clean", "adversarial", "difference")
    for row, images, title, word in zip(
        grid, (clean, adversarial, shown), titles, words, strict=True
    ):
        for axes, image, text in zip(row, images, title, strict=True):
            axes.imshow(image.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(text, fontsize="small", color=RED if word == "adversarial" else "black")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(word)
    figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    known = {"effective": "effective (estimate)", "nearest": "nearest found"}
    return known.get(name) or in_picture(name)


def _styles(columns: Mapping[str, np.ndarray], best: str) -> dict[str, dict[str, Any]]:
    """Return line styles: the bounds that count solid and thick, every other line with dashes of
    its own."""
    attacks = [name for name in columns if name not in ("certified", "effective", best)]
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(attacks):
        colour, dashes = _ATTACKS[i % len(_ATTACKS)]
        styles[name] = {"color": colour, "lw": 1.3, "ls": dashes}
    styles["effective"] = {"color": GOLD, "lw": 1.3, "ls": (0, (5, 1, 1, 1, 1, 1))}
    styles["certified"] = {"color": GREY, "lw": 2}
    return styles | {best: {"color": BLUE, "lw": 2}}


def _in_steps(axes: Axes, values: Sequence[float]) -> None:
    """Give the axis a logarithmic scale with room for 0."""
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(min(values) - 0.1, 1.15 * max(values))
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _name(classes: Sequence[str], k: int) -> str:
    return in_picture(classes[k]) if 0 <= k < len(classes) else str(k)
