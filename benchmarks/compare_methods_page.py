"""Write docs/methods-compared.md and its picture from the results of compare_methods.py.

python benchmarks/compare_methods_page.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_methods import BUDGET, GRIDS, INDEX, METHODS, RESULTS, run_name
from harness import HERE, use_checkout
from torch import Tensor

DOCS = HERE.parent / "docs"
PICTURE = "methods-compared.png"
_CHANCE = 15.0  # percent: of ten classes, and some luck
DRAWN = ("standard", "weight decay", "WEISSI", "EMR + standard", "AT", "GAIRAT", "EMR + AT")


class Results:
    """The results of compare_methods.py in `folder`. Values have shape (seeds, ...)."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / BUDGET).read_text())
        self.budget, self.environment = content["budget"], content["environment"]
        index = json.loads((folder / INDEX).read_text())
        self.chosen = index["chosen"]
        self.known = {p.stem: json.loads(p.read_text()) for p in folder.glob("*-seed*.json")}
        self.runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
        for entry in sorted(index["runs"], key=lambda e: e["seed"]):
            self.runs[entry["name"]].append(self.known[entry["run"]])
        if min(len(runs) for runs in self.runs.values()) < 2:
            raise ValueError(f"{folder} must have at least two seeds of each method for a spread")
        lengths = (len(r["accuracy"]["AutoAttack"]) for runs in self.runs.values() for r in runs)
        self.autoattacked = min(lengths)

    def correct(self, method: str, attack: str) -> Tensor:
        """Return which samples stay correct, (seeds, samples), in percent."""
        bits = [r["accuracy"][attack] for r in self.runs[method]]
        n = self.autoattacked if attack == "AutoAttack" else len(bits[0])
        return 100 * torch.tensor([[int(c) for c in row[:n]] for row in bits]).double()

    def margin(self, method: str, name: str) -> Tensor:
        """Return a value of the trained networks, (seeds,); NaN if a network has become
        constant."""
        return _numbers([r["margins"][name] for r in self.runs[method]])

    def curve(self, method: str, name: str) -> Tensor:
        """Return a value after each epoch, (seeds, epochs)."""
        runs = self.runs[method]
        return torch.stack([_numbers([p[name] for p in r["curve"]]) for r in runs])


def _numbers(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


# -- what is compared ------------------------------------------------------------------------------

Quantity = Callable[[Results, str], Tensor]  # (seeds,), or (seeds, samples)


def accuracy(attack: str) -> Quantity:
    return lambda results, method: results.correct(method, attack)


def overstated(results: Results, method: str) -> Tensor:
    """Return the samples that withstand PGD-20 and not AutoAttack, on the images that both had."""
    strong = results.correct(method, "AutoAttack")
    return results.correct(method, "PGD-20")[:, : strong.shape[1]] - strong


def effective_margin(results: Results, method: str) -> Tensor:
    """Return the median effective margin, in thousandths of the range of a pixel."""
    return 1000 * results.margin(method, "margin_Linf")


def _growth(results: Results, method: str, name: str) -> Tensor:
    """Return the logarithm of the last value divided by the value after the first epoch."""
    curve = results.curve(method, name)
    return (curve[:, -1] / curve[:, 0]).log()


def weight_norm_growth(results: Results, method: str) -> Tensor:
    return _growth(results, method, "weight_norm")


def logits_outgrow_margin(results: Results, method: str) -> Tensor:
    return _growth(results, method, "logit_margin") - _growth(results, method, "margin_L2")


CLEAN, PGD20, AUTO = accuracy("clean"), accuracy("PGD-20"), accuracy("AutoAttack")
UNITS = {
    CLEAN: "clean accuracy, points",
    PGD20: "PGD-20, points",
    AUTO: "AutoAttack, points",
    overstated: "PGD-20 less AutoAttack, points",
    effective_margin: "median effective margin, 1/1000",
    weight_norm_growth: "log of the growth",
    logits_outgrow_margin: "log of the growth, difference",
}


@dataclass(frozen=True)
class Claim:
    """A claim that `quantity` is larger for `method` than for `than` (or than 0), or, with
    `no_less`, not smaller."""

    text: str
    quantity: Quantity
    method: str
    than: str | None = None
    no_less: bool = False

    def difference(self, results: Results) -> tuple[float, float]:
        """Return the mean of the difference over the seeds and its standard error. The error
        combines the spread over seeds and, if verdicts per sample are known, over samples."""
        values = self.quantity(results, self.method)
        if self.than is not None:
            values = values - self.quantity(results, self.than)
        seeds = values.flatten(1).mean(1) if values.dim() > 1 else values
        error = (seeds.var() / len(seeds)).item()
        if values.dim() > 1:
            error += (values.mean(0).var() / values.shape[1]).item()
        return seeds.mean().item(), math.sqrt(error)

    def verdict(self, results: Results) -> str:
        difference, error = self.difference(results)
        if difference > 2 * error:
            return "holds"
        if difference < -2 * error:
            return "does not hold"
        return "not contradicted" if self.no_less else "undecided"


EMR_CLAIMS = (
    Claim(
        "Standard training enlarges the effective weight norm (last epoch against the first)",
        weight_norm_growth,
        "standard",
    ),
    Claim(
        "The margin between its logits outgrows the effective margin",
        logits_outgrow_margin,
        "standard",
    ),
    Claim(
        "Standard training stays below AT's effective margin", effective_margin, "AT", "standard"
    ),
    Claim(
        "EMR enlarges the effective margin in standard training",
        effective_margin,
        "EMR + standard",
        "standard",
    ),
    Claim("EMR enlarges the effective margin in AT", effective_margin, "EMR + AT", "AT"),
    Claim("EMR makes standard training more robust", AUTO, "EMR + standard", "standard"),
    Claim("EMR makes AT more robust", AUTO, "EMR + AT", "AT"),
    Claim("EMR with AT is more robust than TRADES", AUTO, "EMR + AT", "TRADES"),
    Claim("EMR is worth more than weight decay", AUTO, "EMR + standard", "weight decay"),
    Claim("EMR is worth more than WEISSI", AUTO, "EMR + standard", "WEISSI"),
)
WEISSI_CLAIMS = (
    Claim("WEISSI makes standard training more robust", AUTO, "WEISSI", "standard"),
    Claim(
        "WEISSI makes standard training more accurate (at the strength chosen for robustness)",
        CLEAN,
        "WEISSI",
        "standard",
    ),
    Claim("WEISSI is worth more than weight decay", AUTO, "WEISSI", "weight decay"),
)
GAIRAT_CLAIMS = (
    Claim("GAIRAT is more robust to PGD-20 than AT", PGD20, "GAIRAT", "AT"),
    Claim("GAIRAT is no less accurate than AT", CLEAN, "GAIRAT", "AT", no_less=True),
    Claim(
        "GAIRAT is more robust than AT to AutoAttack too (a question the paper does not ask)",
        AUTO,
        "GAIRAT",
        "AT",
    ),
    Claim(
        "PGD-20 overstates the robustness of GAIRAT more than that of AT (its critics)",
        overstated,
        "GAIRAT",
        "AT",
    ),
)
OTHER_CLAIMS = (
    Claim("FAT is more accurate than AT", CLEAN, "FAT", "AT"),
    Claim("FAT is no less robust than AT", AUTO, "FAT", "AT", no_less=True),
    Claim("TRADES is more robust than AT", AUTO, "TRADES", "AT"),
    Claim("MART is more robust than AT", AUTO, "MART", "AT"),
    Claim("MAIL is more robust to PGD-20 than AT", PGD20, "MAIL", "AT"),
    Claim("MAIL is more robust than AT to AutoAttack too", AUTO, "MAIL", "AT"),
    Claim("AWP makes AT more robust", AUTO, "AWP", "AT"),
)
PAPERS = {
    "EMR (Liu and Chan, BMVC 2022)": EMR_CLAIMS,
    "GAIRAT (Zhang et al., ICLR 2021)": GAIRAT_CLAIMS,
    "WEISSI (Liu, Cui and Chan, 2020)": WEISSI_CLAIMS,
    "The others": OTHER_CLAIMS,
}


# -- the page --------------------------------------------------------------------------------------


TEMPLATE = """# The methods compared

`python benchmarks/compare_methods_page.py` generates this page from the measurements of
`python benchmarks/compare_methods.py`.

All methods have the same budget: the first {train:,} training images of the embedded Fashion-MNIST,
{epochs} epochs in batches of {batch_size}, `SmallCNN` (166,406 parameters), SGD with momentum 0.9,
a cyclic learning rate up to {lr}, and no augmentation. The attack has the Linf radius {eps}, which
grows over the first {eps_warmup} epochs, and {steps} steps of a quarter of the radius. There are
{seeds} seeds. Weight decay is 0 except for the method of that name. Each run is judged by its last
network. All other settings are the defaults of `pyadv train --method`. The weights of GAIRAT and
MAIL begin after the published share of the run. In the published schedules the learning rate falls
to a tenth there; in this one it does not, which is a disadvantage for both. The network is small
and trained for a short time. The published settings are larger by orders of magnitude, and these
results say nothing about them.

{where}

## Results

Entries are mean and standard deviation over the seeds. Accuracies are in percent. Clean accuracy,
PGD-20 (steps of eps/4) and margin PGD (40 steps) use {tested} test images. AutoAttack (standard:
APGD-CE, APGD-T, FAB-T, Square with {square_queries:,} queries) uses the first {autoattacked} of
them, which may be harder or easier than all. The column after it is the share of these images that
resist PGD-20 and not AutoAttack. "margin" is the median effective margin in Linf, where
misclassified images count as negative (a constant network has none). "weight norm" is the median
Frobenius norm of dz/dx without the mean logit. "epoch" is CPU time on a busy machine, including the
clean accuracy on 1,000 images at its end; only ratios are meaningful.

{table}
The strengths were chosen on {held_out} held-out training images, with one seed, by accuracy under
PGD-20:

{choice}
## Effective margin and weight norm over training

![Effective margin against weight norm](images/{picture})

Each point is one epoch: the mean over the seeds, on {probe} test images. The last epoch is filled.
On the left the horizontal axis is the norm of the network's Jacobian at the sample, on the right
the product of its layers' Frobenius norms.

## Which claims hold here

A claim holds if the difference is more than two standard errors in its favour, and does not hold if
it is more than two against it. Between them the verdict is "undecided", or "not contradicted" for a
claim of "no less". The error combines the spread over seeds and that over test images. With
{seeds} seeds and {claims} claims one or two verdicts will be wrong by chance.

{verdicts}
{collapsed}The claims of these papers about CIFAR-10 and wide networks are not tested here.
[Objectives](objectives.md) has the objectives and their sources, and the numbers of every run are
in `benchmarks/results/compare_methods`.
"""


def page(results: Results) -> str:
    e = results.environment
    verdicts = (
        f"### {paper}\n\n{_verdicts(results, claims)}\n{_summary(results, claims)}\n"
        for paper, claims in PAPERS.items()
    )
    return TEMPLATE.format(
        **{**results.budget, "autoattacked": results.autoattacked},
        where=f"{e['processor']}, one thread, torch {e['torch']}, pyadv {e['pyadv']}, {e['date']}.",
        table=_table(results),
        choice=_choice(results),
        picture=PICTURE,
        claims=sum(len(claims) for claims in PAPERS.values()),
        verdicts="\n".join(verdicts),
        collapsed=_collapsed(results),
    )


def _table(results: Results) -> str:
    attacks = ("clean", "PGD-20", "margin PGD", "AutoAttack")
    head = ["", *attacks, "PGD-20 too high by", "margin", "weight norm", "epoch, s"]
    rows = [head, ["---"] * len(head)]
    for name in METHODS:
        cells = [_spread(results.correct(name, a).mean(1), 1) for a in attacks]
        cells.append(_spread(overstated(results, name).mean(1), 1))
        cells.append(_spread(results.margin(name, "margin_Linf"), 3))
        cells.append(_spread(results.margin(name, "weight_norm"), 2))
        cells.append(_spread(results.curve(name, "cpu_seconds").median(1).values, 2))
        rows.append([name, *cells])
    return _markdown(rows)


def _choice(results: Results) -> str:
    rows = [["method", "strength", "clean", "PGD-20", ""], ["---"] * 5]
    for name, grid in GRIDS.items():
        for strength in grid:
            known = results.known.get(run_name({**METHODS[name], **strength}, 0), {})
            held = known.get("held_out")
            shown = (
                [f"{100 * held[k]:.1f}" for k in ("clean", "PGD-20")] if held else ["diverged", ""]
            )
            label = ", ".join(f"{k} {v:g}" for k, v in strength.items())
            mark = "chosen" if strength == results.chosen[name] else ""
            rows.append([name, label, *shown, mark])
    return _markdown(rows)


def _verdicts(results: Results, claims: tuple[Claim, ...]) -> str:
    rows = [["claim", "compared", "difference", "verdict"], ["---"] * 4]
    for claim in claims:
        difference, error = claim.difference(results)
        pair = claim.method if claim.than is None else f"{claim.method} - {claim.than}"
        compared = f"{pair}: {UNITS[claim.quantity]}"
        shown = f"{difference:+.2f} ± {error:.2f}"
        rows.append([claim.text, compared, shown, f"**{claim.verdict(results)}**"])
    return _markdown(rows)


def _summary(results: Results, claims: tuple[Claim, ...]) -> str:
    """Return how many claims got each verdict."""
    counts = Counter(claim.verdict(results) for claim in claims)
    return "; ".join(f"{verdict}: {n} of {len(claims)}" for verdict, n in counts.items())


def _collapsed(results: Results) -> str:
    """Return a sentence that names the networks that answer one class, whatever the image."""
    found = [
        f"{name} with seed {seed}"
        for name in METHODS
        for seed, clean in enumerate(results.correct(name, "clean").mean(1).tolist())
        if clean < _CHANCE
    ]
    if not found:
        return ""
    return (
        f"Networks that ended at chance level: {', '.join(found)}. They count like the others.\n\n"
    )


def _spread(values: Tensor, digits: int) -> str:
    """Return mean and standard deviation, and the number of seeds if some are missing."""
    known = values[values.isfinite()]
    if len(known) < 2:
        return "-"
    rest = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{known.mean():.{digits}f} ± {known.std():.{digits}f}{rest}"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure  # pyplot would need global state and a display
    from pictures import save

    from pyadv._plot_style import BLUE, GOLD, GREEN, GREY, PURPLE, RED, plain

    looks = zip((GREY, GOLD, GREEN, RED, BLUE, PURPLE, "black"), "osD^oXP", strict=True)
    lines = dict(zip(DRAWN, looks, strict=True))
    # EMR + AT follows AT closely: a wide pale line and large markers show below a thin black one.
    wide = {"lw": 5, "ms": 10, "solid_capstyle": "round", "alpha": 0.45}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    norms = {
        "weight_norm": "effective weight norm, median of ||dz/dx||",
        "log_norm_product": "log of the product of the layers' norms",
    }
    for axis, (name, label) in zip(axes, norms.items(), strict=True):
        plain(axis)
        for method, (colour, marker) in lines.items():
            x = results.curve(method, name).mean(0)
            y = results.curve(method, "margin_L2").mean(0)
            style = {"lw": 1.3, "ms": 5} | (wide if method == "AT" else {})
            axis.plot(x, y, f"-{marker}", color=colour, mfc="white", label=method, **style)
            axis.plot(x[-1:], y[-1:], marker, color=colour, ms=1.6 * style["ms"])
        axis.set_xlabel(label)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("effective margin, median, L2")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="of compare_methods.py")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    use_checkout()
    results = Results(given.results)
    given.docs.mkdir(parents=True, exist_ok=True)
    (given.docs / "methods-compared.md").write_text(page(results))
    draw(results, given.docs / "images" / PICTURE)


if __name__ == "__main__":
    main()
