"""Pictures show the right numbers as lines and the right pixels as images."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

from pyadv.evaluation import Margins, plots  # noqa: E402


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the figures that were saved, while saving them as usual."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def margins(distances: dict[str, Tensor], certified: Tensor | None) -> Margins:
    effective = torch.tensor([0.1, 0.2, 0.4, math.inf, -0.1])
    ones = torch.ones(5).long()
    return Margins(
        norm="L2",
        label=ones,
        prediction=torch.tensor([1, 1, 1, 1, 0]),
        effective=effective,
        distances=distances,
        certified=certified,
        uncertified=None,
        x_adv=torch.zeros(5, 1),
        queries=ones,
        gradients=ones,
        descriptions={},
    )


def lines(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}


def test_margins_are_drawn_as_shares_of_all_samples(tmp_path: Path, figures: list) -> None:
    found = {
        "FAB": torch.tensor([0.1, 0.3, 0.5, math.inf, 0.0]),
        "bisection": torch.tensor([0.2, 0.2, 0.5, 0.8, 0.0]),
    }
    certified = torch.tensor([0.01, 0.02, 0.02, 0.0, 0.0])
    plots.margin_distributions(margins(found, certified), tmp_path / "m.png")
    assert is_png(tmp_path / "m.png")
    left, right = figures[0].axes
    curves = lines(right)
    labels = ["certified", "effective (estimate)", "FAB", "bisection", "nearest found"]
    assert list(curves) == labels
    for name, radius, share in (
        ("certified", 0.015, 40),
        ("certified", 0.03, 0),
        ("FAB", 0.7, 20),  # no point was found for one sample
        ("nearest found", 0.15, 60),
        ("nearest found", 0.01, 80),  # one is misclassified without an attack
    ):
        radii, shares = curves[name]
        assert shares[np.searchsorted(radii, radius)] == pytest.approx(share), (name, radius)
    nearest = next(p for p in left.patches if p.get_label() == "nearest found")
    # three of four samples; the fourth lies beyond the axis
    assert nearest.get_data().values.sum() == pytest.approx(75)


@pytest.mark.parametrize(("samples", "bins"), [(10, 8), (60, 15), (1000, 40)])
def test_few_margins_have_few_bins(samples: int, bins: int, tmp_path: Path, figures: list) -> None:
    few = margins({}, None)
    few = dataclasses.replace(
        few,
        label=few.label[:1].expand(samples),
        prediction=few.prediction[:1].expand(samples),
        effective=torch.linspace(0.1, 0.4, samples),
    )
    plots.margin_distributions(few, tmp_path / "m.png")
    (bars, *_) = figures[0].axes[0].patches
    assert len(bars.get_data().values) == bins


@pytest.mark.parametrize("distances", [{}, {"one": torch.tensor([math.inf] * 4 + [0.0])}])
def test_margins_without_anything_found(distances: dict, tmp_path: Path, figures: list) -> None:
    plots.margin_distributions(margins(distances, None), tmp_path / "m.png")
    assert is_png(tmp_path / "m.png")
    radii, shares = lines(figures[0].axes[1])[next(iter(distances), "effective (estimate)")]
    assert shares[-1] == (80 if distances else 40)


def test_accuracy_curves(tmp_path: Path, figures: list) -> None:
    curves = {
        "eps": {"PGD": [(0.2, 0.25), (0.0, 1.0), (0.1, 0.5)], "Square": [(0.0, 1.0), (0.2, 0.75)]},
        "steps": [(0, 0.5), (10, 0.25), (100, 0.125)],
    }
    plots.accuracy_against(curves, tmp_path / "c.png")
    assert is_png(tmp_path / "c.png")
    eps, steps = figures[0].axes
    assert [t.get_text() for t in eps.get_legend().get_texts()] == ["PGD", "Square"]
    x, y = lines(eps)["PGD"]
    assert list(x) == [0.0, 0.1, 0.2] and list(y) == [100, 50, 25]
    assert steps.get_legend() is None and steps.get_xlabel() == "steps"
    assert list(steps.get_xticks()) == [0, 10, 100]
    for bad in ({}, {"eps": []}, {"eps": {"PGD": []}}):
        with pytest.raises(ValueError, match="curves must hold"):
            plots.accuracy_against(bad, tmp_path / "none.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_examples(channels: int, tmp_path: Path, figures: list) -> None:
    x = torch.rand(12, channels, 6, 5)
    x_adv = x.clone()
    x_adv[0, 0, 1, 2] += 0.05
    x_adv[0, 0, 3, 3] -= 0.025
    y, y_adv = torch.zeros(12).long(), torch.arange(12)
    plots.worst_examples(x, x_adv, y, y_adv, ("cat", "dog"), tmp_path / "e.png")
    assert is_png(tmp_path / "e.png")
    grid = np.array(figures[0].axes).reshape(3, 10)
    clean, adversarial, difference = (np.array(row[0].images[0].get_array()) for row in grid)
    assert clean.reshape(6, 5, -1) == pytest.approx(x[0].permute(1, 2, 0).numpy())
    assert adversarial.reshape(6, 5, -1)[1, 2, 0] == pytest.approx(x_adv[0, 0, 1, 2].clip(0, 1))
    difference = difference.reshape(6, 5, -1)[..., 0]
    assert difference[1, 2] == pytest.approx(1.0) and difference[0, 0] == 0.5
    assert difference[3, 3] == pytest.approx(0.25, abs=1e-5)
    titles = [[axes.get_title() for axes in row] for row in grid]
    assert titles[0][0] == "cat" and titles[1][:3] == ["cat", "dog", "2"]
    assert titles[2][:2] == ["x 10.0", "no change"]


def test_refusals(tmp_path: Path) -> None:
    x, y = torch.rand(2, 1, 4, 4), torch.zeros(2).long()
    for given, message in (
        ((x[:0], x[:0], y[:0], y[:0]), "x must be"),
        ((x[:, 0], x[:, 0], y, y), "x must be"),
        ((x.repeat(1, 2, 1, 1),) * 2 + (y, y), r"x must be .* got \[2, 2, 4, 4\]"),
        ((x, x[:1], y, y), "x_adv must have the shape of x"),
        ((x, x, y, y[:1]), "got .*, 2 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.worst_examples(*given, ("a",), tmp_path / "e.png")
    wrong = margins({}, None)
    wrong.prediction[:] = 0
    with pytest.raises(ValueError, match="correctly classified"):
        plots.margin_distributions(wrong, tmp_path / "m.png")
