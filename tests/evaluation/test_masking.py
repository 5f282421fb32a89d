"""Masking checks pass on an honest model and fail on it with each fault that misleads attacks."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyadv.evaluation import Check, MaskingReport, check_masking
from pyadv.evaluation.masking import _flat
from pyadv.evaluation.masking_statistics import OTHER_LOSS, difference, smallest_difference

N, EPS = 120, 0.03
QUIET = {"queries": 60, "progress": None}


class Honest(nn.Module):
    """A model of three linear scores of a 1x6x6 image, equal in the middle of the box."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(2 * torch.randn(3, 36, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T.to(x.dtype)


class Faulty(nn.Module):
    """The honest model with a function before or after it."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.honest, self.how = Honest(), forward
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def problem(n: int = N) -> tuple[Tensor, Tensor]:
    x = 0.2 + 0.6 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return x, Honest()(x).argmax(1)


def found(report: MaskingReport) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "suspicious"}


def saturated(m: Faulty, x: Tensor) -> Tensor:
    """Return a model with margins beyond 104, where the float32 softmax has no gradient left."""
    return 200 * m.honest(x)


def quantised(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(torch.round(x * 32) / 32)


def no_gradient(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(x.detach())


def noisy(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(x + 0.02 * torch.randn_like(x))


def dropout_left_on(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(F.dropout(x, 0.2, training=True))


def probabilities(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(x).softmax(1)


def other_when_attacked(m: Faulty, x: Tensor) -> Tensor:
    z = m.honest(x)
    return z + x.mean() if torch.is_grad_enabled() and x.requires_grad else z


def of_the_batch(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(x - 0.1 * (x.mean(0) - 0.5))


def learns(m: Faulty, x: Tensor) -> Tensor:
    m.seen += len(x)
    return m.honest(x)


def rough(m: Faulty, x: Tensor) -> Tensor:
    return m.honest(x + 0.01 * torch.sin(900 * x))


@pytest.fixture(scope="module")
def honest() -> MaskingReport:
    return check_masking(Honest(), *problem(), eps=EPS, surrogate=Honest(), **QUIET)


def test_honest_model_passes_every_check(honest: MaskingReport) -> None:
    assert not honest.masked and {c.verdict for c in honest.checks} == {"ok"}, str(honest)
    assert 0.2 < honest["loss"].numbers["margin"] < 0.8
    assert honest.summary.startswith("Nothing looks masked: 11 of 11 checks ran, all ok; with ")
    assert f"with {honest.n:,} samples another loss would have to break " in honest.summary
    least = smallest_difference(honest.n, OTHER_LOSS)
    enough = torch.arange(honest.n) < round(least * honest.n)
    assert difference(enough) > OTHER_LOSS >= difference(enough & (enough.cumsum(0) > 1))
    assert smallest_difference(3, 0.9) == 1


@pytest.mark.parametrize(
    ("fault", "flags"),
    [
        (saturated, {"loss", "logit scale", "radius", "gradients"}),
        (quantised, {"gradients", "starts", "radius", "square", "transfer"}),
        (no_gradient, {"gradients", "square", "transfer"}),
        (probabilities, {"probabilities"}),
        (other_when_attacked, {"dynamic"}),
        (of_the_batch, {"dynamic"}),
        (learns, {"dynamic"}),
        (rough, {"starts", "radius", "square", "transfer"}),
    ],
    ids=lambda v: getattr(v, "__name__", "flags"),
)
def test_each_fault_is_flagged_by_its_checks(fault, flags: set[str]) -> None:
    report = check_masking(Faulty(fault), *problem(), eps=EPS, surrogate=Honest(), **QUIET)
    assert found(report) == flags


def test_a_model_that_learns_is_put_back() -> None:
    model = Faulty(learns).train()
    check_masking(model, *problem(), eps=EPS, **QUIET)
    assert model.seen == 0 and model.training


@pytest.mark.parametrize("fault", [noisy, dropout_left_on])
def test_chance_is_flagged_as_such(fault) -> None:
    report = check_masking(Faulty(fault), *problem(), eps=EPS, **QUIET)
    assert "randomised" in found(report) and report["dynamic"].verdict == "ok"


def test_a_model_without_gradient_is_searched() -> None:
    report = check_masking(Faulty(no_gradient), *problem(), eps=EPS, **QUIET)
    names = ("loss", "logit scale", "steps", "starts", "radius", "transfer")
    assert {c.name for c in report.checks if c.verdict == "not run"} == set(names)
    assert report["loss"].text == "The model passes no gradient."
    assert report["square"].numbers["withstood"] == 1.0 and report.curves == {}


def test_curves_and_passes(honest: MaskingReport) -> None:
    steps, eps = honest.curves["steps"], honest.curves["eps"]
    assert [v for v, _ in steps] == [0, 10, 20, 50, 100]
    assert [v for v, _ in eps] == pytest.approx([0, 0.015, 0.03, 0.045, 0.06, 0.12, 1])
    assert steps[0][1] == eps[0][1] == 1.0 and steps[2][1] == eps[2][1] and eps[-1][1] == 0.0
    assert honest.gradients == 1 + 100 + 20 + 2 * 20 + 4 * 20 + 5 * 20
    rows = 0

    def counting(x: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return Honest()(x)

    counted = check_masking(counting, *problem(), eps=EPS, surrogate=Honest(), **QUIET)
    assert counted.queries == rows / N and counted.checks == honest.checks


def test_result_depends_neither_on_batches_nor_on_order(honest: MaskingReport) -> None:
    x, y = problem()
    order = torch.randperm(N)
    small = {**QUIET, "batch_size": 37}
    report = check_masking(Honest(), x[order], y[order], eps=EPS, surrogate=Honest(), **small)
    assert report.checks == honest.checks and report.curves == honest.curves


def test_model_and_generator_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model.train()
    model[1].eval()  # a frozen layer stays frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with torch.inference_mode():
        report = check_masking(model, *problem(20), eps=EPS, batch_size=8, **QUIET)
    assert report["dynamic"].verdict == report["randomised"].verdict == "ok"
    assert model.training and model[0].training and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_other_norms_boxes_and_outputs(norm: str) -> None:
    """The same model in a box of twice the size around another point raises no alarm."""
    x, y = problem(40)
    lo = torch.full((1, 1, 1, 1), -3.0)
    report = check_masking(
        lambda z: {"scores": Honest()((z + 3) / 2)},
        2 * x - 3,
        y,
        eps=0.2 if norm == "L2" else 1.0,
        norm=norm.lower(),
        lo=lo,
        hi=-1.0,
        output="scores",
        **QUIET,
    )
    assert not report.masked and report.norm == norm, str(report)
    full = report.curves["eps"][-1]
    assert full == (pytest.approx(2 * 6 if norm == "L2" else 2 * 36), 0.0)


def test_rows_of_numbers_and_samples_that_are_all_wrong(device: torch.device) -> None:
    x, y = problem(30)  # batches are moved to the device of the model
    flat = check_masking(
        Honest().to(device), x.flatten(1).double(), y, eps=EPS, lo=None, hi=None, **QUIET
    )
    assert flat["square"].text == "Square Attack needs images." and not flat.masked
    wrong = check_masking(Honest(), x, (y + 1) % 3, eps=EPS, surrogate=Honest(), **QUIET)
    ran = {c.name for c in wrong.checks if c.verdict == "ok"}
    assert ran == {"gradients", "randomised", "dynamic", "probabilities"}
    assert wrong["square"].text == "No sample is classified correctly."


def test_few_samples_raise_no_alarm_by_chance() -> None:
    yes, no = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    assert difference(yes, no) < 0 < difference(yes.expand(8), no.expand(8))
    # Computed by hand for 30 and 10 of N = 100: 30.5 and 10.5 of 102, and an interval of 2 standard
    # errors below 20 / 102.
    more, fewer = torch.arange(100) < 30, torch.arange(100) >= 90
    assert difference(more, fewer) == pytest.approx(0.196078 - 2 * 0.0596981, abs=1e-5)
    assert difference(more) == pytest.approx(30 / 102 - 2 * 0.0461686, abs=1e-5)


def test_more_steps_must_change_little_in_either_direction() -> None:
    at = [torch.arange(1000) < n for n in (700, 600, 590, 580)]
    assert _flat(at).verdict == "ok"
    assert _flat([at[0], at[0], at[0], at[3]]).fault == "20 steps are too few to tell"
    assert _flat([at[3], at[3], at[3], at[0]]).fault == "more steps leave more"


def test_report_as_text_and_data(honest: MaskingReport) -> None:
    bad = Check("loss", "suspicious", "PGD leaves 1 % and 0 %: it misleads.", "it misleads", {})
    report = MaskingReport(9, "Linf", 0.1, (bad, honest["steps"]), {"eps": [(0.0, 1.0)]}, 3.0, 2.0)
    assert report.masked
    assert report.summary == "Looks masked, by 1 of 2 checks: it misleads (loss)."
    assert "| loss | suspicious | PGD leaves 1 % and 0 %: it misleads. |" in report.to_markdown()
    assert str(report).splitlines()[:2] == ["9 samples, Linf, eps 0.1", report.summary]
    read = json.loads(json.dumps(report.to_dict()))
    assert read["masked"] and read["checks"][0]["verdict"] == "suspicious"
    assert read["curves"] == {"eps": [[0.0, 1.0]]} and read["n"] == 9
    with pytest.raises(KeyError, match="no check 'lost'; there are loss, steps"):
        report["lost"]


def test_progress(capsys: pytest.CaptureFixture) -> None:
    seen: list[tuple] = []
    settings = {"eps": EPS, "queries": 5, "batch_size": 20}
    check_masking(Honest(), *problem(30), progress=lambda *a: seen.append(a), **settings)
    assert seen[:2] == [("clean", 20, 30, 30), ("clean", 30, 30, 30)]
    assert {name for name, *_ in seen} >= {"steps", "loss", "logit scale", "starts", "square"}
    check_masking(Honest(), *problem(3), **settings)
    assert "logit scale" in capsys.readouterr().err


def test_refusals() -> None:
    x, y = problem(4)
    for given, error, message in (
        ((x[:0], y[:0]), ValueError, "x must hold at least one sample"),
        ((x, y[:3]), ValueError, r"y must have shape \[4\]"),
        ((x, y + 7), ValueError, "labels 0..2"),
        ((9 * x, y), ValueError, "box"),
        ((x.long(), y), TypeError, "x must be float16"),
    ):
        with pytest.raises(error, match=message):
            check_masking(Honest(), *given, eps=EPS, progress=None)
    for settings, error, message in (
        ({"eps": 0.0}, ValueError, "eps must be > 0"),
        ({"eps": torch.tensor(0.1)}, TypeError, "eps must be one float"),
        ({"eps": EPS, "batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        ({"eps": EPS, "queries": -1}, ValueError, "queries must be an integer >= 0"),
        ({"eps": EPS, "norm": "L3"}, ValueError, "norm must be"),
    ):
        with pytest.raises(error, match=message):
            check_masking(Honest(), x, y, progress=None, **settings)
    with pytest.raises(ValueError, match="at least 2 classes, got C = 1"):
        check_masking(lambda z: z.flatten(1)[:, :1], x, 0 * y, eps=EPS, progress=None)
