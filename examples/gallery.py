"""Run the tutorials and draw the pictures of the documentation's gallery from their networks.

python examples/gallery.py        # about five minutes on one core; writes docs/images/gallery/
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from pyadv import training
from pyadv._plot_style import line, plain
from pyadv.attacks import APGD, PGD, Square
from pyadv.data import ImageData, load
from pyadv.evaluation import plots
from pyadv.training import Config

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images" / "gallery"
RADII = (0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
sys.path.insert(0, str(ROOT / "tests"))

import pages  # noqa: E402 (in tests/)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    data = load("fashion-mini")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        trained = pages.run("docs/tutorials/train.md")
        take("curves.png", "training.png")
        studied = pages.run("docs/tutorials/really-robust.md")
        take("margins.png", "margins.png")
        networks = {"standard": trained.standard, "AT": trained.robust}

        x, y = data.test_x[:300], data.test_y[:300]
        lines = {f"{name}: PGD-20": curve(m, x, y, PGD, steps=20) for name, m in networks.items()}
        lines["AT: APGD"] = curve(trained.robust, x, y, APGD, steps=40)
        lines["AT: Square"] = curve(trained.robust, x[:100], y[:100], Square, queries=500)
        plots.accuracy_against({"eps": lines}, "eps.png")
        take("eps.png", "accuracy-eps.png")

        masked = {"rounding: PGD-20": curve(studied.defended, x, y, PGD, steps=20)}
        masked["rounding: adaptive"] = [
            (eps, adaptive_accuracy(studied, x, y, eps)) for eps in RADII
        ]
        masked["AT: PGD-20"] = curve(studied.robust, x, y, PGD, steps=20)
        plots.accuracy_against({"eps": masked}, "masked.png")
        take("masked.png", "masked.png")

        for name, model in networks.items():
            worst(model, data, f"{name}.png")
            take(f"{name}.png", f"examples-{name.lower()}.png")
        home(networks, data, lines, Path("home.png"))
        take("home.png", "home.png")

        np.savez(
            "few.npz",
            x_train=data.train_x[:2000],
            y_train=data.train_y[:2000],
            x_test=data.test_x[:200],
            y_test=data.test_y[:200],
        )
        config = Config(method="gairat", data="few.npz", epochs=8, begin_epoch=3, eps=0.1)
        training.train(config, "run")
        take("run/kappa.png", "kappa.png")


def curve(model, x, y, attack, **settings):
    """Return (eps, robust accuracy) pairs under the margin loss."""
    found = []
    for eps in RADII:
        more = {} if attack is Square else {"loss": "dlr" if attack is APGD else "margin"}
        made = attack(model, eps=eps, seed=0, **settings, **more)
        if attack is PGD:
            made = made.with_(best="fooled")
        found.append((eps, made.run(x, y).robust_accuracy))
    return found


def adaptive_accuracy(studied, x, y, eps):
    """Return the accuracy of the defence on examples made through its straight-through form."""
    attack = PGD(studied.StraightThrough(studied.plain), eps=eps, steps=20, loss="margin")
    x_adv = attack.with_(best="fooled")(x, y)
    return (studied.defended(x_adv).argmax(1) == y).float().mean().item()


def broken(model, data: ImageData, n: int = 8):
    """Return images that the model knows and PGD breaks, with the examples and predictions."""
    x, y = data.test_x[:300], data.test_y[:300]
    result = PGD(model, eps=0.1, steps=20, loss="margin", best="fooled", seed=0).run(x, y)
    chosen = ((model(x).argmax(1) == y) & ~result.correct).nonzero()[:, 0]
    first = {label: row for row, label in reversed([(i, int(y[i])) for i in chosen.tolist()])}
    rows = torch.tensor(sorted(first.values())[:n])  # one of each class
    return x[rows], result.x_adv[rows], y[rows], result.logits.argmax(1)[rows]


def worst(model, data: ImageData, path: str) -> None:
    x, x_adv, y, seen = broken(model, data)
    plots.worst_examples(x, x_adv, y, seen, data.classes, path)


def home(networks, data: ImageData, lines, path: Path) -> None:
    """Draw examples beside robust accuracy against eps."""
    x, x_adv, y, seen = broken(networks["standard"], data, 4)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    grid = left.subplots(2, 4)
    for row, images, labels in zip(grid, (x, x_adv), (y, seen), strict=True):
        for axes, image, label in zip(row, images[:, 0], labels.tolist(), strict=True):
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


def take(made: str, name: str) -> None:
    """Keep a picture at 1000 pixels of width and in 48 colours."""
    with Image.open(made) as image:
        image = image.convert("RGB")
        image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
        image.quantize(48, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


if __name__ == "__main__":
    main()
