"""The pictures of docs/benchmarks-in-full.md: bars of ratios, a roofline, and curves of costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from harness import Row, quartiles, ratios
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # pyplot would need global state and a display
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from pyadv._plot_style import BLUE, GOLD, GREEN, GREY, PURPLE, RED, plain

_NO_DITHER = Image.Dither.NONE
_COLOURS = {
    "floor": GREY,
    "copy_": GREY,
    "reference": GOLD,
    "eager": RED,
    "compile": GREEN,
    "linf_step": PURPLE,
}


def draw(question: str, rows: list[Row], images: Path, folder: str) -> Iterator[tuple[str, str]]:
    """Yield the file name and caption of each picture that these rows allow."""
    rows = [r for r in rows if r.times_us and r.threads == max(x.threads for x in rows)]
    stem = f"bench-{folder[:-11]}-{question}"
    curves = [r for r in rows if r.series and r.at is not None]
    if question in ("attacks", "training", "evaluation"):
        yield _bars(rows, images / f"{stem}.png"), "Time of each provider, relative to pyadv"
    if question == "ops" and curves:
        caption = "Bandwidth against the size of the tensor"
        yield _roofline(curves, images / f"{stem}-roofline.png"), caption
    if question == "scaling" and curves:
        yield (
            _curves(curves, images / f"{stem}.png"),
            "Time of a call against the quantity that grows",
        )


def _panels(n: int, heights: list[float]) -> tuple[Figure, list[Axes]]:
    """Return a grid of axes in two columns, with the given heights of the rows."""
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), min(n, 2), height_ratios=heights)
    return figure, [figure.add_subplot(grid[i // 2, i % 2]) for i in range(n)]


def save(figure: Figure, path: Path) -> str:
    """Write a picture in 255 colours, a third of its size, and return the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        # The default method merges the colours of thin lines.
        small = image.convert("RGB").quantize(255, Image.Quantize.FASTOCTREE, dither=_NO_DITHER)
    small.save(path, optimize=True)
    return path.name


def _bars(rows: list[Row], path: Path) -> str:
    cases = [[r for r in rows if r.case == c] for c in dict.fromkeys(r.case for r in rows)]
    lines = [max(map(len, cases[i : i + 2])) for i in range(0, len(cases), 2)]
    figure, axes = _panels(len(cases), [0.8 + 0.25 * n for n in lines])
    for axis, case in zip(axes, cases, strict=True):
        ours = next((r for r in case if r.provider == r.ours), case[0])
        for i, row in enumerate(case):
            values = ratios(row, ours)
            middle, (low, high) = statistics.median(values), quartiles(values)
            mine = row.provider.startswith(row.ours)
            colour = BLUE if mine else GREY if row.yardstick else RED
            axis.barh(i, middle, color=colour, height=0.65)
            axis.plot([low, high], [i, i], color="black", linewidth=1)
            axis.text(max(high, middle), i, f"  {middle:.2f}", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(case)), [r.provider for r in case], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(case[0].case, fontsize=9)
        plain(axis)
        axis.grid(False)
    figure.supxlabel("time relative to the first line; black lines: quartiles", fontsize=9)
    return save(figure, path)


def _roofline(rows: list[Row], path: Path) -> str:
    """Draw the bandwidth of the ops. They compute little, so the bandwidth of a copy bounds
    them."""
    figure, axes = _lines(rows, lambda r: (r.at / 1e6, r.gigabytes_per_second))
    for axis in axes:
        axis.set(xlabel="size of a tensor, MB", ylabel="GB/s")
    return save(figure, path)


def _curves(rows: list[Row], path: Path) -> str:
    figure, axes = _lines(rows, lambda r: (r.at, r.median_us / 1e3))
    for axis in axes:
        axis.set_ylabel("ms per call")
    return save(figure, path)


def _lines(rows: list[Row], point) -> tuple[Figure, list[Axes]]:
    """Draw a panel per series and a line per provider, on logarithmic axes."""
    series = [[r for r in rows if r.series == s] for s in dict.fromkeys(r.series for r in rows)]
    figure, axes = _panels(len(series), [3.0] * -(-len(series) // 2))
    for axis, here in zip(axes, series, strict=True):
        for provider in dict.fromkeys(r.provider for r in here):
            points = sorted(point(r) for r in here if r.provider == provider)
            kind, _, variant = provider.partition(",")
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                label=provider,
                color=_COLOURS.get(
                    kind.removesuffix(" in place"), BLUE if "pyadv" in kind else RED
                ),
                linestyle=":" if variant else "--" if kind.endswith("in place") else "-",
            )
        axis.set(xscale="log", yscale="log", title=here[0].series)
        ticks = sorted({point(r)[0] for r in here})
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
        axis.yaxis.set_major_formatter(FuncFormatter(_short))
        plain(axis)
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, axes


def _short(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
