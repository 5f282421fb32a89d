"""Draw the pictures of the documentation's gallery, two of them by running the tutorials.

python examples/gallery.py        # about three minutes on one core; writes docs/images/gallery/
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from pyadv._plot_style import line, plain
from pyadv.attacks import APGD, PGD, Square
from pyadv.data import ImageData, load
from pyadv.evaluation import plots
from pyadv.models import SmallCNN
from pyadv.objectives import AT, Standard

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
        networks = {
            "standard": train(Standard(), data),
            "AT": train(AT(PGD(eps=0.1, steps=5)), data),
        }
        robust, defended = networks["AT"], Rounded(networks["standard"])

        x, y = data.test_x[:100], data.test_y[:100]
        lines = {f"{name}: PGD-20": curve(m, x, y, PGD, steps=20) for name, m in networks.items()}
        lines["AT: APGD"] = curve(robust, x, y, APGD, steps=30)
        lines["AT: Square"] = curve(robust, x[:60], y[:60], Square, queries=300)
        plots.accuracy_against({"eps": lines}, "eps.png")
        take("eps.png", "accuracy-eps.png")

        for name, model in networks.items():
            worst(model, data, f"{name}.png")
            take(f"{name}.png", f"examples-{name.lower()}.png")
        home(networks, data, lines, Path("home.png"))
        take("home.png", "home.png")

        masked = {"rounding: PGD-20": curve(defended, x, y, PGD, steps=20)}
        adaptive = Rounded(networks["standard"], straight_through=True)
        masked["rounding: adaptive"] = curve(adaptive, x, y, PGD, steps=20)
        masked["AT: PGD-20"] = lines["AT: PGD-20"]
        plots.accuracy_against({"eps": masked}, "masked.png")
        take("masked.png", "masked.png")

        pages.run("docs/tutorials/train.md")
        take("curves.png", "training.png")
        pages.run("docs/tutorials/really-robust.md")
        take("margins.png", "margins.png")


class Rounded(nn.Module):
    """A network behind a defence that rounds its input to 9 levels.

    With `straight_through`, the backward pass takes the rounding for the identity: it is the same
    function, and attacks are not misled.
    """

    def __init__(self, model: nn.Module, straight_through: bool = False):
        super().__init__()
        self.model, self.straight_through = model, straight_through

    def forward(self, x):
        rounded = (x * 8).round() / 8
        return self.model(x + (rounded - x).detach() if self.straight_through else rounded)


def train(objective, data: ImageData) -> nn.Module:
    """Return a SmallCNN after 3 epochs on 3,000 images."""
    torch.manual_seed(0)
    model = SmallCNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(1, 4):
        for ids in torch.randperm(3000).split(100):
            optimizer.zero_grad()
            objective(model, data.train_x[ids], data.train_y[ids], epoch=epoch).backward()
            optimizer.step()
    return model.eval()


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


def broken(model, data: ImageData, n: int = 8):
    """Return images that the model knows and PGD breaks, with the examples and predictions."""
    x, y = data.test_x[:150], data.test_y[:150]
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
        for axes, image, label in zip(row, images[:, 0], labels.tolist(), strict=False):
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
    """Keep a picture at 1000 pixels of width and in 255 colours."""
    with Image.open(made) as image:
        image = image.convert("RGB")
        image.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
        image.quantize(255, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            OUT / name, optimize=True
        )


if __name__ == "__main__":
    main()
