"""Reports on classifiers whose robust accuracy is known in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyadv.attacks import APGD, FMN, PGD, AutoAttack
from pyadv.attacks.ensemble import Findings
from pyadv.evaluation import Report, Row, evaluate, standard_attacks


def linear_problem(n: int = 60) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a linear two-class model, samples far from the box's walls, and each sample's exact
    Linf distance to the boundary (negative when misclassified)."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=g))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = 0.2 + 0.6 * torch.rand(n, 3, 2, 2, generator=g)
    z = model(x).detach()
    y = z.argmax(1) ^ (torch.rand(n, generator=g) < 0.2)
    margin = z.gather(1, y[:, None])[:, 0] - z.gather(1, 1 - y[:, None])[:, 0]
    return model, x, y, margin / (model[1].weight[0] - model[1].weight[1]).norm(1).detach()


def test_accuracy_is_exact_on_a_linear_model() -> None:
    model, x, y, distance = linear_problem()
    eps = 0.03
    assert 0.2 < (distance > eps).float().mean() < (distance > 0).float().mean() - 0.1
    report = evaluate(model, x, y, eps=eps, batch_size=13)
    assert torch.equal(report["clean"].correct, distance > 0)
    for name in ("PGD-20", "margin PGD", "worst case"):
        row = report.worst if name == "worst case" else report[name]
        assert torch.equal(row.correct, distance > eps), name


def test_a_sample_that_is_wrong_at_x_is_not_robust() -> None:
    """Neither where the attack has left it by its first iterate, nor where it has been moved."""
    model, x, y, distance = linear_problem()
    w = model[1].weight.detach()
    to_right = 0.1 * torch.sign((w[0] - w[1]) * (1 - 2 * y[:, None])).view(x.shape)
    moved = PGD(eps=0.1, steps=0, start=lambda given: given + to_right)
    assert moved.run(x, y, model=model).correct[distance < 0].any()
    report = evaluate(model, x, y, eps=0.1, attacks={"moved": moved})
    assert torch.equal(report["moved"].correct, distance > 0)


def test_result_does_not_depend_on_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3))
    x, y = torch.rand(37, 3, 2, 2), torch.randint(3, (37,))
    attacks = {"one": PGD(eps=0.1, alpha=0.01, steps=1, seed=5)}  # with one step the start decides
    reports = [evaluate(model, x, y, eps=0.1, attacks=attacks, batch_size=b) for b in (37, 5)]
    assert torch.equal(reports[0]["one"].correct, reports[1]["one"].correct)


def test_model_and_generator_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model.train()
    model[1].eval()  # a frozen layer stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(9, 3, 2, 2)
    rng = torch.get_rng_state()
    evaluate(model, x, torch.zeros(9).long(), eps=0.1)
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_progress_and_descriptions() -> None:
    model, x, y, _ = linear_problem(10)
    seen = []
    report = evaluate(model, x, y, eps=0.1, batch_size=4, progress=lambda *a: seen.append(a))
    standing = int(report.worst.correct.sum())
    assert [s[:3] for s in seen[:3]] == [("clean", 4, 10), ("clean", 8, 10), ("clean", 10, 10)]
    assert len(seen) == 9 and seen[-1] == ("margin PGD", 10, 10, standing)
    assert report["margin PGD"].description == (
        "Linf 0.1, 40 steps of 0.025, loss margin, best=fooled, keyed start"
    )
    assert report.norm == "Linf" and report.n == 10


def test_norms_and_own_attacks() -> None:
    model, x, y, _ = linear_problem(10)
    for norm, canonical in (("l2", "L2"), (1, "L1")):
        report = evaluate(model, x, y, eps=0.5, norm=norm)
        assert report.norm == canonical
        assert {r.name for r in report.rows} == {"clean", *standard_attacks(0.5, norm)}
        assert report["APGD" if canonical == "L1" else "PGD-20"].accuracy < 0.8
    assert [r.name for r in evaluate(model, x, y, eps=0.1, attacks={}).rows] == ["clean"]


def test_any_loss_can_be_described() -> None:
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    assert PGD(loss=loss, eps=0.1, alpha=1, steps=3).describe() == (
        "Linf 0.1, 3 steps of 1, loss CrossEntropyLoss, keyed start"
    )


def test_row_statistics_and_worst_case(tmp_path: Path) -> None:
    passes = torch.tensor([1, 2, 2, 3]), torch.tensor([0, 1, 1, 2])
    a = Row("a", "first", torch.tensor([True, True, True, False]), *passes)
    b = Row("b", "second", torch.tensor([True, False, True, True]), *passes)
    report = Report(4, "Linf", 0.1, (a, b), Findings(("clean", "a", "b")))
    assert a.accuracy == 0.75 and a.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert report.worst.correct.tolist() == [True, False, True, False]
    report.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["eps"] == 0.1 and read["n"] == 4
    assert [r["accuracy"] for r in read["rows"]] == [0.75, 0.75, 0.5]
    assert [r["forward_passes_per_sample"] for r in read["rows"]] == [2, 2, 4]
    assert [r["backward_passes_per_sample"] for r in read["rows"]] == [1, 1, 2]
    assert "50.00 (15.00 to 85.00) %" in str(report)  # Wilson's interval of 2 of 4
    assert read["rows"][0]["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert "75.00 (30.06–95.44)" in report.to_markdown()
    with pytest.raises(KeyError, match="no row 'c'; there are a, b"):
        report["c"]


def test_refusals() -> None:
    model, x, y, _ = linear_problem(4)
    with pytest.raises(ValueError, match="for N = 0 >= 1"):
        evaluate(model, x[:0], y[:0], eps=0.1)
    with pytest.raises(ValueError, match=r"N = 4 .* got \[3\]"):
        evaluate(model, x, y[:3], eps=0.1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        evaluate(model, x, y, eps=0.1, batch_size=0)
    with pytest.raises(ValueError, match="data must hold at least one sample"):
        evaluate(model, [], eps=0.1)
    with pytest.raises(ValueError, match="batches carry their labels"):
        evaluate(model, [(x, y)], y, eps=0.1)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        evaluate(model, [(x, y)], eps=0.1, chunk=0)
    with pytest.raises(ValueError, match="labels"):
        evaluate(model, x, y + 7, eps=0.1)
    with pytest.raises(ValueError, match="box"):
        evaluate(model, x * 9, y, eps=0.1)


def test_batches_are_streamed_and_packed() -> None:
    model, x, y, distance = linear_problem()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    settings = {"eps": 0.03, "progress": None}
    whole = evaluate(model, x, y, **settings)
    for chunk in (1, 20, 1000):
        report = evaluate(model, loader, chunk=chunk, **settings)
        assert report.n == 60
        for row, other in zip(report.rows, whole.rows, strict=True):
            assert torch.equal(row.correct, other.correct)
    seen: list[int] = []

    def sized(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return model(inputs)

    custom = AutoAttack(model, eps=0.03, version="custom", attacks=["apgd-ce"], progress=None)
    packed = evaluate(sized, loader, attacks=custom, batch_size=16, **settings)
    assert torch.equal(packed.worst.correct, distance > 0.03)
    assert seen[:4] == [16, 16, 16, 12]  # batches of 7 were packed into batches of 16
    with pytest.raises(ValueError, match="norm of the report, L2, but 'AutoAttack' has norm=Linf"):
        evaluate(model, loader, attacks=custom, norm="L2", **settings)
    rows, x_adv = packed.findings.examples()
    broken = packed["clean"].correct & ~packed["apgd-ce"].correct
    assert torch.equal(rows, broken.nonzero()[:, 0])
    assert ((x_adv - x[rows]).abs().max() <= 0.03 + 1e-6) and (
        model(x_adv).argmax(1) != y[rows]
    ).all()
    assert packed["apgd-ce"].queries[~packed["clean"].correct].sum() == 0


def test_suites_and_their_passes() -> None:
    model, x, y, distance = linear_problem(20)
    report = evaluate(model, x, y, eps=0.03, attacks="pgdplus", progress=None)
    assert torch.equal(report["PGD+"].correct, distance > 0.03)
    assert report["PGD+"].description.startswith("Linf 0.03, 40 steps of 0.009677, loss ce")
    assert report["clean"].queries.tolist() == [1] * 20 and not report["clean"].gradients.any()
    full = evaluate(model, x[:4], y[:4], eps=0.03, attacks="autoattack", progress=None)
    names = ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [row.name for row in full.rows] == names
    assert torch.equal(full.worst.correct, full["square"].correct)
    assert torch.equal(full.worst.correct, distance[:4] > 0.03)
    with pytest.raises(
        ValueError, match="attacks must be one of pgd20, pgdplus, autoattack, .*'aa'"
    ):
        evaluate(model, x, y, eps=0.1, attacks="aa")


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    model, x, y, _ = linear_problem()
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    whole = evaluate(model, x, y, eps=0.03, progress=None)
    state, calls = tmp_path / "state.pt", []

    def interrupt(*now: object) -> None:
        calls.append(now)
        if len(calls) == 17:
            raise KeyboardInterrupt

    settings = {"eps": 0.03, "chunk": 20, "batch_size": 5, "state": state}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, loader, progress=interrupt, **settings)
    again: list[object] = []
    report = evaluate(model, loader, progress=lambda *now: again.append(now), **settings)
    assert len(again) == 3 * 12 - 17  # there are 12 batches for each of 3 attacks, and 17 were done
    for row, other in zip(report.rows, whole.rows, strict=True):
        assert torch.equal(row.correct, other.correct) and torch.equal(row.queries, other.queries)
    with pytest.raises(ValueError, match=r"with another PGD-20\.alpha: 0\.0075, now 0\.01; .*eps"):
        evaluate(model, loader, **{**settings, "eps": 0.04})
    with pytest.raises(ValueError, match=r"another PGD-20\.seed: 0, now 3"):
        evaluate(model, loader, seed=3, **settings)


class Blind:
    """An attack that reports adversarial logits that are not finite."""

    def __init__(self, rows: int):
        self.rows = rows

    def run(self, x, y, ids=None, draw=None, model=None):
        result = PGD(eps=0.1, steps=1, seed=0).run(x, y, ids, draw, model)
        result.non_finite = torch.arange(len(y)) < self.rows
        result.correct &= ~result.non_finite
        return result

    def attempts(self, classes: int) -> int:
        return 1

    def describe(self) -> str:
        return "blind"


def test_logits_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    model, x, y, _ = linear_problem(20)
    attacks = {"blind": Blind(3), "PGD": PGD(eps=0.1, steps=1, seed=0)}
    report = evaluate(model, x, y, eps=0.1, attacks=attacks, state=tmp_path / "s", progress=None)
    assert [r["non_finite"] for r in report.to_dict()["rows"]] == [0, 3, 0, 3]
    assert report["blind"].non_finite.tolist() == [True] * 3 + [False] * 17
    text = "blind reached logits with NaN or +inf on 3 of 20 samples"
    assert text in str(report) and text in report.to_markdown()
    again = evaluate(model, x, y, eps=0.1, attacks=attacks, state=tmp_path / "s", progress=None)
    assert again.to_dict() == report.to_dict()


def test_no_broken_sample_leaves_a_doubt() -> None:
    row = Row("a", "", torch.ones(10, dtype=torch.bool), torch.zeros(10), torch.zeros(10))
    assert row.interval == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("attack", "what"),
    [
        (PGD(eps=0.2), "eps=0.2"),
        (PGD(norm="L2", eps=0.1), "norm=L2"),
        (PGD(eps=0.1, lo=-1.0), "lo=-1"),
        (PGD(eps=0.1, hi=None), "hi=None"),
        (PGD(eps=0.1, targeted=True), "targeted"),
        (PGD(eps=torch.full((10,), 0.2)), "eps="),
        (FMN(eps=0.2), "eps=0.2"),
        (FMN(norm="L2"), "norm=L2"),
        (AutoAttack(None, eps=0.1, version="custom", attacks={"bad": FMN()}), "no|none"),
        (AutoAttack(None, eps=0.1, version="custom", attacks={"bad": PGD(eps=0.3)}), "eps=0.3"),
    ],
)
def test_attacks_that_do_not_fit_the_report_are_refused(attack: object, what: str) -> None:
    model, x, y, _ = linear_problem(10)
    attacks = attack if isinstance(attack, AutoAttack) else {"bad": attack}
    with pytest.raises(ValueError, match=f"'bad'.*({what})|'bad' is|'bad' has none"):
        evaluate(model, x, y, eps=0.1, attacks=attacks, progress=None)


def test_the_nearest_point_is_judged_at_the_radius_of_the_report(tmp_path: Path) -> None:
    model, x, y, distance = linear_problem(20)
    report = evaluate(
        model, x, y, eps=0.03, attacks={"FMN": FMN()}, state=tmp_path / "s", progress=None
    )
    assert torch.equal(report["FMN"].correct, distance > 0.03)
    assert report["FMN"].description == "Linf, the nearest point, 100 steps, within 0.03"
    with pytest.raises(ValueError, match="another"):
        evaluate(model, x, y, eps=0.04, attacks={"FMN": FMN()}, state=tmp_path / "s")


@pytest.mark.parametrize("attacks", ["pgd20", "pgdplus", "autoattack"])
def test_normalised_inputs_have_a_box_of_their_own(attacks: str) -> None:
    model, x, y, _ = linear_problem(12)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), 0.25
    normalised = lambda z: model(z * std + mean)  # noqa: E731
    settings = {"attacks": attacks, "progress": None, "batch_size": 12}
    plain = evaluate(model, x, y, eps=0.03, **settings)
    box = {"lo": (0 - mean) / std, "hi": (1 - mean) / std}
    report = evaluate(normalised, (x - mean) / std, y, eps=0.03 / std, **box, **settings)
    assert torch.equal(report.worst.correct, plain.worst.correct)
    assert not plain.worst.correct.all()
    with pytest.raises(ValueError, match="box"):
        evaluate(normalised, (x - mean) / std, y, eps=0.03 / std, **settings)


def test_evaluation_judges_every_iterate_and_l1_by_apgd() -> None:
    assert all(a.best == "fooled" for a in standard_attacks(0.1).values())
    assert {type(a) for a in standard_attacks(1.0, "L1").values()} == {APGD}


def test_one_attack_is_enough() -> None:
    model, x, y, distance = linear_problem(20)
    attack = PGD(eps=0.03, alpha=0.03, loss="margin")
    report = evaluate(model, x, y, eps=0.03, attacks=attack, progress=None)
    assert [row.name for row in report.rows] == ["clean", "PGD"]
    assert torch.equal(report.worst.correct, distance > 0.03)
    settings = {"eps": 0.03, "version": "custom", "seed": 0, "progress": None}
    for one in (attack, "apgd-ce"):
        result = AutoAttack(model, attacks=one, **settings).run(x, y)
        assert torch.equal(result.correct, distance > 0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"y": {0, 1}}, "y must be an int64 tensor, got set"),
        ({"y": torch.tensor([0.0, 1, 0, 1])}, "y must be an int64 tensor, got torch.float32"),
        ({"attacks": [PGD()]}, "attacks must be one of pgd20, .* or one attack, got list"),
        ({"attacks": {"a": PGD}}, "attacks must hold attack objects, but 'a' is the class"),
        ({"attacks": {"a": print}}, "'a' is a builtin_function_or_method, which has no run, att"),
        ({"attacks": {3: PGD()}}, "attacks must have strings as names, got 3"),
        (
            {"data": [(torch.rand(2, 12), [0, 1])]},
            r"batches \(x, y\) of tensors, .*\[2, 12\], list\)",
        ),
        ({"data": [torch.rand(2, 12)]}, r"batches \(x, y\) of tensors, .*32 \[2, 12\]"),
        ({"data": [{"x": 1}]}, r"batches as dicts with one floating .*got \{'x': int\}"),
    ],
)
def test_unusable_arguments_are_named(settings: dict, message: str) -> None:
    model, x, y, _ = linear_problem(4)
    given = {"data": x, "y": None if "data" in settings else y, "eps": 0.1, **settings}
    with pytest.raises(TypeError, match=message):
        evaluate(model, progress=None, **given)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (3.5, TypeError, "output must be None, a callable, a key or attribute name, or an index"),
        (True, TypeError, "output must be None"),
        ("nope", ValueError, "output='nope' finds nothing in the dict .* it has scores, aux"),
        (4, ValueError, "output=4 finds nothing in the dict"),
    ],
)
def test_an_output_that_finds_no_logits(output: object, error: type, message: str) -> None:
    model, x, y, _ = linear_problem(4)

    def in_dict(x: Tensor) -> dict[str, Tensor]:
        return {"scores": model(x), "aux": x}

    with pytest.raises(error, match=message):
        AutoAttack(in_dict, eps=0.1, output=output, progress=None).run(x, y)
    if error is TypeError:
        with pytest.raises(error, match=message):  # raised before any forward pass
            AutoAttack(in_dict, eps=0.1, output=output)


def test_an_evaluation_does_not_follow_the_default_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(9, 1, 4, 4)
    y = model(x).argmax(1)
    expected = evaluate(model, x, y, eps=0.1, progress=None)
    torch.set_default_device("meta")
    try:
        found = evaluate(model, x, y, eps=0.1, progress=None)
    finally:
        torch.set_default_device(None)
    assert found.to_dict()["rows"] == expected.to_dict()["rows"]
