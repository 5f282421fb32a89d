"""Draw the pictures of the documentation's gallery with the networks that two tutorials train.

python benchmarks/gallery.py      # about three minutes on one core; writes docs/images/gallery/
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from pyadv._plot_style import line, plain
from pyadv.attacks import APGD, PGD, Square
from pyadv.data import ImageData
from pyadv.evaluation import plots

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images" / "gallery"
RADII = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
Lines = dict[str, list[tuple[float, float]]]


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import pages  # in tests/

    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pages.run("docs/tutorials/train.md")
        take("curves.png", OUT / "training.png")
        page = pages.run("docs/tutorials/really-robust.md")
        take("margins.png", OUT / "margins.png")
        draw(page, OUT)


def draw(page: ModuleType, out: Path) -> None:
    """Draw in `out` what the networks of the tutorial "Is it really robust?" have to show.

    Args:
        page: the tutorial, run. Its images are those of every curve.
        out: folder of the pictures. The working directory gets them in full size.
    """
    networks = {"standard": page.plain, "AT": page.robust}
    lines = against_eps(networks, page.x, page.y)
    plots.accuracy_against({"eps": lines}, "eps.png")
    take("eps.png", out / "accuracy-eps.png")

    for name, model in networks.items():
        x, x_adv, y, seen = broken(model, page.data)
        plots.worst_examples(x, x_adv, y, seen, page.data.classes, f"{name}.png")
        take(f"{name}.png", out / f"examples-{name.lower()}.png")
    home(networks, page.data, lines, Path("home.png"))
    take("home.png", out / "home.png")

    rounding = {"PGD-20": page.defended, "adaptive": page.StraightThrough(page.plain)}
    masked = {
        f"rounding: {name}": curve(model, page.x, page.y, PGD, steps=20)
        for name, model in rounding.items()
    }
    masked["AT: PGD-20"] = lines["AT: PGD-20"]
    plots.accuracy_against({"eps": masked}, "masked.png")
    take("masked.png", out / "masked.png")


def against_eps(networks: dict[str, nn.Module], x: Tensor, y: Tensor) -> Lines:
    """Return the curves of three attacks, all on the same images."""
    lines = {f"{name}: PGD-20": curve(m, x, y, PGD, steps=20) for name, m in networks.items()}
    lines["AT: APGD"] = curve(networks["AT"], x, y, APGD, steps=30)
    lines["AT: Square"] = curve(networks["AT"], x, y, Square, queries=300)
    return lines


def curve(model, x: Tensor, y: Tensor, attack, **settings) -> list[tuple[float, float]]:
    """Return (eps, robust accuracy) pairs under the margin loss."""
    found = []
    for eps in RADII:
        more = {} if attack is Square else {"loss": "dlr" if attack is APGD else "margin"}
        made = attack(model, eps=eps, seed=0, **settings, **more)
        if attack is PGD:
            made = made.with_(best="fooled")
        found.append((eps, made.run(x, y).robust_accuracy))
    return found


def broken(model, data: ImageData, n: int = 8):
    """Return images that the model knows and PGD breaks, with the examples and predictions."""
    x, y = data.test_x[:150], data.test_y[:150]
    result = PGD(model, eps=0.1, steps=20, loss="margin", best="fooled", seed=0).run(x, y)
    chosen = ((model(x).argmax(1) == y) & ~result.correct).nonzero()[:, 0]
    first = {label: row for row, label in reversed([(i, int(y[i])) for i in chosen.tolist()])}
    rows = torch.tensor(sorted(first.values())[:n], dtype=torch.long)  # one of each class
    return x[rows], result.x_adv[rows], y[rows], result.logits.argmax(1)[rows]


def home(networks: dict[str, nn.Module], data: ImageData, lines: Lines, path: Path) -> None:
    """Draw examples beside robust accuracy against eps."""
    x, x_adv, y, seen = broken(networks["standard"], data, 4)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    grid = left.subplots(2, 4)
    for row, images, labels in zip(grid, (x, x_adv), (y, seen), strict=True):
        for axes, image, label in zip(row, images[:, 0].numpy(), labels.tolist(), strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
            axes.set_title(data.classes[label], fontsize="small")
            axes.set(xticks=[], yticks=[])
    grid[0, 0].set_ylabel("clean")
    grid[1, 0].set_ylabel("adversarial")
    axes = right.subplots()
    for i, name in enumerate(networks):
        radii, shares = zip(*lines[f"{name}: PGD-20"], strict=True)
        axes.plot(radii, [100 * s for s in shares], label=name, **line(i))
    axes.set(xlabel="eps (Linf)", ylabel="robust accuracy (%)", ylim=(0, 100))
    axes.legend(frameon=False)
    plain(axes)
    figure.savefig(path, dpi=110)


def take(made: str, path: Path) -> None:
    """Keep a picture at 1000 pixels of width and in 255 colours."""
    with Image.open(made) as image:
        image = image.convert("RGB")
        image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
        image.quantize(255, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


if __name__ == "__main__":
    main()
