"""Margins are exact on classifiers with known distances and ordered correctly on others."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from networks import ConvNet, RowLinear
from torch import Tensor, nn

from pyadv.attacks import FAB, PGD, DeepFool, TargetedFAB
from pyadv.evaluation import (
    Bisection,
    Margins,
    effective_margin,
    margin_attacks,
    measure_margins,
    spectrally_normalized_margin,
)

DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}
FEW = {"steps": 30}


def linear_problem(classes: int = 4, n: int = 40) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a linear model and samples far from the walls of the box; some labels are wrong."""
    g = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 12, generator=g))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = 0.45 + 0.1 * torch.rand(n, 3, 2, 2, generator=g, dtype=torch.float64)
    y = model(x).detach().argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return model, x, y


def signed_distance(model: nn.Sequential, x: Tensor, y: Tensor, norm: str) -> Tensor:
    w, z = model[1].weight.detach(), model(x).detach()
    gap = z.gather(1, y[:, None]) - z
    slope = torch.linalg.vector_norm(w[y][:, None] - w, DUAL[norm], dim=2)
    return torch.where(slope > 0, gap / slope, torch.inf).amin(1)


def attacks(norm: str, **settings) -> dict:
    """Return the default attacks with fewer steps."""
    few = {"FAB-T": TargetedFAB(norm=norm, seed=0, **FEW, **settings)}
    return {**margin_attacks(norm, seed=0, **settings), **few}


@pytest.mark.parametrize("norm", DUAL)
def test_all_measures_agree_on_a_linear_model(norm: str) -> None:
    model, x, y = linear_problem()
    margins = measure_margins(model, x, y, norm=norm, attacks=attacks(norm), batch_size=17)
    true = signed_distance(model, x, y, norm)
    assert torch.equal(margins.correct, true > 0) and 0.5 < margins.correct.double().mean() < 0.9
    torch.testing.assert_close(margins.effective, true)
    expected = {"DeepFool", "FAB-T", "bisection"} - ({"DeepFool"} if norm == "L1" else set())
    assert set(margins.distances) == expected
    distance = true.clamp(min=0)
    # DeepFool overshoots, and the L1 attack moves several coordinates although one is optimal.
    tolerance = {"DeepFool": 0.02, "FAB-T": 0.01, "bisection": 0.6 if norm == "L1" else 0.01}
    for name, values in margins.distances.items():
        assert (values >= distance * (1 - 1e-9)).all(), name
        assert (values <= (distance + 1.1e-4) * (1 + tolerance[name])).all(), name
    # With two classes the certificate is the L2 distance itself.
    l2 = signed_distance(model, x, y, "L2").clamp(min=0)
    torch.testing.assert_close(margins.certified, l2 / (12**0.5 if norm == "Linf" else 1))
    assert (margins.certified <= distance).all()


def small_network(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    ).double()
    with torch.no_grad():
        for p in model[3].parameters():
            p *= scale
    return model


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_bounds_and_the_scale_of_the_logits(norm: str) -> None:
    x = torch.rand(30, 1, 4, 4, dtype=torch.float64)
    model = small_network()
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    one, ten = (
        measure_margins(m, x, y, norm=norm, attacks=attacks(norm))
        for m in (model, small_network(10.0))
    )
    found = one.nearest.isfinite()
    assert found.all() and (one.certified <= one.nearest).all() and (one.nearest[3:] > 0).all()
    for name, values in one.columns.items():
        torch.testing.assert_close(ten.columns[name], values, rtol=1e-6, atol=1e-9, msg=name)
    # The nearest point is kept; it lies at the stated distance and fools the model.
    p = math.inf if norm == "Linf" else 2
    length = torch.linalg.vector_norm((one.x_adv - x).flatten(1), p, dim=1)
    torch.testing.assert_close(length, one.nearest)
    assert (model(one.x_adv).argmax(1) != y).all()
    assert torch.equal(torch.stack([*one.distances.values()]).amin(0), one.nearest)


def test_nothing_depends_on_the_batches() -> None:
    model = RowLinear(12, classes=5)
    x, y = torch.rand(23, 3, 2, 2), torch.randint(5, (23,))
    order = torch.randperm(23)
    whole = measure_margins(model, x, y, attacks=attacks("Linf"))
    parts = measure_margins(model, x[order], y[order], attacks=attacks("Linf"), batch_size=4)
    for name, values in whole.columns.items():
        assert torch.equal(parts.columns[name], values[order]), name
    for name in ("x_adv", "prediction", "queries", "gradients"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)[order]), name


def test_model_and_generator_are_left_as_they_were_and_passes_are_counted() -> None:
    model, passes = ConvNet().train(), []
    model.body[1].eval()
    model.head.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y, rng = torch.rand(9, 3, 6, 6), torch.zeros(9).long(), torch.get_rng_state()
    with torch.inference_mode():
        y[:6] = measure_margins(model, x, y, attacks={}).prediction[:6]
        passes.clear()
        search = {"bisection": Bisection(attack=lambda eps: PGD(eps=eps, alpha=eps, steps=3))}
        margins = measure_margins(model, x, y, attacks=search, certificate=False)
        assert sum(passes) == margins.queries.sum() and margins.gradients.max() > 3 * 10
        spectrally_normalized_margin(model, x, y)
    assert model.training and model.head.training and not model.body[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_effective_margin_of_flat_and_steep_models() -> None:
    class Table(nn.Module):
        """A model whose logits at x = 0 are flat, flat or infinitely steep, and of slope 2."""

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tensor([[2.0, 1.0, 3.0], [1.0, 0.0, 0.0], [5.0, 1.0, 5.0]])
            steep = torch.stack([0 * x[1], 0 * x[1], x[1].sqrt()], 1)
            return z + torch.cat([0 * x[:1].expand(1, 3), steep, 2 * x[2] * torch.eye(3)[1:2]])

    x = torch.zeros(3, 1)
    got = [effective_margin(Table(), x, torch.full((3,), label)) for label in (0, 1)]
    assert got[0].tolist() == [-math.inf, math.inf, 0.0]
    assert got[1][2] == -2.0


def test_bisection_brackets_with_any_attack() -> None:
    """The bisection works if the first radius is far too large or too small, or nothing is
    found."""
    model, x, y = linear_problem(2)
    true = signed_distance(model, x, y, "L2")

    class Bent(nn.Module):
        """A model with the same decisions but another slope at x, which makes the estimate
        wrong."""

        def __init__(self, power: float):
            super().__init__()
            self.power = power

        def forward(self, x: Tensor) -> Tensor:
            z = model(x)
            gap = z[:, :1] - z[:, 1:]
            return torch.cat([gap.sign() * gap.abs() ** self.power, 0 * gap], 1)

    def attack(eps: Tensor) -> PGD:
        return PGD(norm="L2", eps=eps, alpha=eps, steps=1, loss="margin", start="none")

    for power in (0.2, 5.0):
        search = Bisection(Bent(power), norm="L2", attack=attack, rounds=14)
        result = search.run(x, y)
        right = true > 0
        torch.testing.assert_close(result.distances[right], true[right], rtol=0.01, atol=0)
        assert (result.distances[~right] == 0).all()

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum((1, 2, 3)) * 0 + 1, x.sum((1, 2, 3)) * 0], 1)

    for box in ({}, {"lo": None, "hi": None}):
        result = Bisection(rounds=4, **box).run(x, torch.zeros_like(y), model=Constant())
        assert result.distances.isinf().all() and result.correct.all()
        assert torch.equal(result.x_adv, x)
        rounds = 4 if box else 1  # the radius that contains the box is tried at once
        assert (result.queries == 2 + rounds * 23).all()


def test_rows_summary_and_file(tmp_path: Path) -> None:
    margins = Margins(
        norm="L2",
        label=torch.tensor([0, 1, 1, 0, 1]),
        prediction=torch.tensor([0, 1, 0, 0, 1]),
        effective=torch.tensor([0.5, 1.0, -0.25, 1.5, math.inf]),
        distances={
            "a": torch.tensor([0.4, 1.0, 0.0, 2.0, math.inf]),
            "b": torch.tensor([0.5, 0.75, 0.0, math.inf, math.inf]),
        },
        certified=None,
        uncertified="because",
        x_adv=torch.zeros(5, 1),
        queries=torch.tensor([1, 2, 3, 4, 5]),
        gradients=torch.tensor([0, 0, 0, 0, 5]),
        descriptions={"a": "first", "b": "second"},
    )
    assert list(margins.columns) == ["effective", "a", "b", "nearest"]
    assert margins.nearest.tolist() == pytest.approx([0.4, 0.75, 0.0, 2.0, math.inf])
    row = margins.summary()["a"]
    assert row["median"] == 1.0 and row["found"] == 0.75
    data = json.loads(json.dumps(margins.to_dict(), allow_nan=False))
    assert data["accuracy"] == 0.8 and data["summary"]["b"]["q95"] is None
    assert data["forward_passes_per_sample"] == 3 and data["backward_passes_per_sample"] == 1
    margins.to_csv(tmp_path / "margins.csv")
    with open(tmp_path / "margins.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "prediction", *margins.columns]
    assert [r["id"] for r in rows] == list("01234") and rows[2]["prediction"] == "0"
    assert float(rows[1]["b"]) == 0.75 and float(rows[4]["nearest"]) == math.inf
    text = str(margins)
    assert "4 of 5 samples" in text and "75.0 %" in text and "No certificate: because." in text
    table = margins.to_markdown()
    assert "| a | 0.4 | 0.4 | 1 | 2 | 2 | 75.0 % |" in table and "- b: second" in table


def test_certificates_are_left_out_where_nothing_is_proven() -> None:
    x, y = torch.rand(4, 3, 6, 6), torch.zeros(4).long()
    margins = measure_margins(ConvNet(), x, y, attacks={})
    assert margins.certified is None and "(ConvNet)" in margins.uncertified
    assert list(margins.columns) == ["effective"] and (margins.queries == 1).all()
    chain = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    assert measure_margins(chain, x, y, attacks={}).certified is not None
    assert measure_margins(chain, x, y, attacks={}, certificate=False).uncertified is None
    hidden = measure_margins(chain, x, y, attacks={}, output=lambda z: 9 * z)
    assert hidden.certified is None and "output=" in hidden.uncertified


def test_spectrally_normalized_margin() -> None:
    """The margin uses the spectral norms, which are 5.526446 and 2.570353 here."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, 4], [0, -1]]))
        model[2].weight.copy_(torch.tensor([[0.5, -1, 2], [1, 0, 1]]))
    x, y = torch.rand(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    z = model(x).detach().double()
    gap = (z[:, 0] - z[:, 1]) * (1 - 2 * y)
    got = spectrally_normalized_margin(model, x, y, batch_size=3)
    torch.testing.assert_close(got, gap / (5.526446 * 2.570353), rtol=1e-5, atol=1e-7)


def test_progress_and_refusals() -> None:
    model, x, y = linear_problem(2, 10)
    seen = []
    some = {"DeepFool": DeepFool(norm="Linf")}
    measure_margins(model, x, y, attacks=some, batch_size=4, progress=lambda *a: seen.append(a))
    assert [row[:3] for row in seen[:3]] == [("effective", done, 10) for done in (4, 8, 10)]
    assert seen[2][3] == 8 and seen[3:] == [("DeepFool", 4, 8, 4), ("DeepFool", 8, 8, 0)]
    for given, settings, message in (
        ((x[:0], y[:0]), {}, "x must hold at least one sample"),
        ((x, y[:3]), {}, "y must have shape"),
        ((x, y + 5), {}, "labels"),
        ((9 * x, y), {}, "box"),
        ((x, y), {"batch_size": 0}, "batch_size must be"),
        ((x, y), {"norm": "L3"}, "norm must be"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_margins(model, *given, **settings)
    for attack in (FAB(norm="L2"), Bisection(norm=2)):
        with pytest.raises(ValueError, match="must measure in Linf, but 'one' does in L2"):
            measure_margins(model, x, y, attacks={"one": attack})
    with pytest.raises(ValueError, match="rounds must be"):
        Bisection(rounds=0)
    with pytest.raises(TypeError, match="Module"):
        spectrally_normalized_margin(lambda x: x, x, y)
