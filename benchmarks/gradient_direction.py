"""On confident samples, does the cross-entropy gradient still point the right way?

    python benchmarks/gradient_direction.py [--out docs/images/gradient_direction.png]

The model is a linear classifier with 10 classes whose logits are scaled until the margin has the
given value. The plot shows the share of input elements whose gradient has the sign of the exact
(float64) direction, for autograd of the cross-entropy in float32, as attacks compute it, and for
pyadv.ops.attack_loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from pyadv import ops

MARGINS = [2, 4, 8, 12, 14, 15, 16, 17, 18, 20, 30, 40, 60, 80, 90, 100, 104, 110]


def samples(margin: float, rows: int = 64, inputs: int = 3072, classes: int = 10):
    """Return weights, logits with exactly this margin, and labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, inputs, generator=generator, dtype=torch.float64)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    y = logits.argmax(1)
    top = logits.topk(2, dim=1).values
    logits *= (margin / (top[:, 0] - top[:, 1]))[:, None]
    return weight, logits, y


def exact_direction(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the direction of the cross-entropy gradient: softmax over the other classes minus the
    one-hot label."""
    others = logits.clone().scatter_(1, y[:, None], -torch.inf).softmax(1)
    return others.scatter(1, y[:, None], -1.0)


def by_autograd(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, y, reduction="sum").backward()
    return leaf.grad


def by_pyadv(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ops.attack_loss(logits, y, "ce")[1]


def agreement(margin: float) -> dict[str, float]:
    weight, logits, y = samples(margin)
    wanted = (exact_direction(logits, y) @ weight).sign()
    result = {}
    for name, gradient in (("autograd", by_autograd), ("pyadv", by_pyadv)):
        got = gradient(logits.float(), y) @ weight.float()
        result[name] = float((got.sign() == wanted).double().mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {m: agreement(m) for m in MARGINS}
    print("| logit margin | autograd, float32 | pyadv, float32 |\n|---|---|---|")
    for margin, share in found.items():
        print(f"| {margin} | {share['autograd']:.4f} | {share['pyadv']:.4f} |")
    if options.out:
        plot(found, options.out)


def plot(found: dict[float, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, label, style in (
        ("pyadv", "pyadv.ops.attack_loss", dict(color="#1b6ca8", marker="o")),
        ("autograd", "autograd of cross-entropy", dict(color="#c8553d", marker="s")),
    ):
        share = [100 * s[name] for s in found.values()]
        axes.plot(list(found), share, label=label, markersize=4, **style)
    axes.set_xlabel("logit margin of the sample")
    axes.set_ylabel("gradient signs that are right, %")
    axes.set_title("Direction of the input gradient in float32", fontsize=11)
    axes.set_ylim(-3, 104)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
