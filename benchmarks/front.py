"""What docs/benchmarks.md opens with: the three questions of a user, each with a picture, and one
table of the answers. Everything else is on the page for developers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Row, commit_words, ratios, time_words

Found = dict[str, tuple[dict[str, Any], list[Row]]]


@dataclass(frozen=True)
class Question:
    """A question of a user.

    Attributes:
        title: the question, a heading.
        picture: the stem of the picture's file.
        cases: the file of rows and the case in it, where it was measured.
        note: what a reader must know to compare fairly.
        other_work: providers that do other work than the case names: drawn in grey, and never the
            fastest other code.
    """

    title: str
    picture: str
    cases: tuple[tuple[str, str], ...]
    note: str
    other_work: tuple[str, ...] = ()


QUESTIONS = (
    Question(
        "How long does PGD take?",
        "first-pgd",
        (
            ("attacks", "PGD, 10 steps, SmallCNN, batch 32"),
            ("attacks", "PGD, 10 steps, ResNet-18, batch 32"),
            ("gpu_attacks", "PGD, 10 steps, ResNet-18, batch 128"),
            ("gpu_attacks", "PGD, 10 steps, WRN-34-10, batch 128"),
        ),
        "The network's own passes take nearly all of the time. pyadv saves the rest, and with "
        '`speed="fast"` part of the passes too.',
    ),
    Question(
        "How long does AutoAttack take?",
        "first-autoattack",
        (
            ("evaluation", "AutoAttack standard, SmallCNN, 100 images"),
            ("gpu_autoattack", "AutoAttack standard, ResNet-18, 512 images"),
        ),
        "`pyautoattack` is the authors' code, and the verdicts are the same. torchattacks' class "
        "of that name (grey) runs 10 iterations of each attack where the published ensemble runs "
        "100, so it is another, weaker attack, and the table leaves it out.",
        other_work=("torchattacks",),
    ),
    Question(
        "How long does a training step take?",
        "first-training",
        tuple(
            ("training", f"{method}, SmallCNN, batch 128")
            for method in ("AT", "TRADES", "MART", "GAIRAT", "FAT", "AT + EMR")
        ),
        "The official form is the authors' code of the step.",
    ),
)


def page(devices: list[Found], images: Path) -> list[str]:
    """Return the parts of the page, and write its pictures to a folder.

    Args:
        devices: file -> environment and rows, for each device that was measured.
        images: the folder of pictures.
    """
    table = [
        '| | device and commit | pyadv | `speed="fast"` | fastest other | its time / pyadv\'s |',
        "|---|---|---|---|---|---|",
    ]
    parts = []
    for question in QUESTIONS:
        shown = []
        for file, case in question.cases:
            for found in devices:
                environment, rows = found.get(file, ({}, []))
                threads = max((r.threads for r in rows), default=0)
                here = [r for r in rows if (r.case, r.threads) == (case, threads) and r.times_us]
                if any(r.provider == r.ours for r in here):
                    shown.append((environment["device"], here))
                    where = environment["device"] + commit_words(environment)
                    table.append(_line(where, here, question.other_work))
        if shown:
            picture = _draw(shown, question.other_work, images / f"{question.picture}.png")
            parts += [
                f"## {question.title}\n",
                f"![{question.title}](images/{picture})\n",
                question.note + "\n",
            ]
    return ["\n".join(table) + "\n", *parts] if parts else []


def _line(where: str, rows: list[Row], other_work: tuple[str, ...]) -> str:
    """Return a line of the table. The fastest other code is the fastest that does the same work."""
    ours = next(r for r in rows if r.provider == r.ours)
    fast = next((r for r in rows if r.provider == f"{r.ours} fast"), None)
    others = [
        (statistics.median(ratios(r, ours)), r)
        for r in rows
        if not (r.yardstick or r.provider.startswith(r.ours) or r.provider in other_work)
    ]
    cells = [ours.case, where, f"**{time_words(ours.median_us)}**"]
    cells.append(time_words(fast.median_us) if fast else "")
    if others:
        ratio, other = min(others, key=lambda pair: pair[0])
        cells += [f"{other.provider}: {time_words(other.median_us)}", f"{ratio:.2f}"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def _draw(shown: list[tuple[str, list[Row]]], other_work: tuple[str, ...], path: Path) -> str:
    """Draw a panel of bars per case, and return the file's name."""
    from matplotlib.figure import Figure
    from pictures import save

    from pyadv._plot_style import BLUE, GREY, RED, plain

    bars = [[r for r in rows if not r.yardstick] for _, rows in shown]
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    lines = -(-len(shown) // columns)
    heights = [
        max(len(b) for b in bars[i * columns : (i + 1) * columns]) * 0.26 + 0.7
        for i in range(lines)
    ]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(lines, columns, height_ratios=heights)
    for i, ((device, _), rows) in enumerate(zip(shown, bars, strict=True)):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        for y, row in enumerate(rows):
            # Hatching tells pyadv's bars from the others in grey print.
            look = {"color": RED, "hatch": "//", "edgecolor": "white"}
            if row.provider.startswith(row.ours):
                look = {"color": BLUE}
            elif row.provider in other_work:
                look |= {"color": GREY, "hatch": ".."}
            axes.barh(y, row.median_us / 1e6, height=0.7, **look)
            axes.text(
                row.median_us / 1e6, y, f" {time_words(row.median_us)}", va="center", fontsize=8
            )
        axes.set_yticks(range(len(rows)), [r.provider for r in rows], fontsize=8)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        plain(axes)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_title(f"{rows[0].case}\n", fontsize=9)
        axes.text(0.5, 1.01, device, transform=axes.transAxes, ha="center", fontsize=8, color=GREY)
    return save(figure, path)
