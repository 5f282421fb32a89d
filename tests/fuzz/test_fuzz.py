"""A short slice of the search, and that the search finds what is wrong."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fuzz import attacks, case, config, ops
from fuzz.runner import AREAS, FOUND, main, run_case, search
from pyadv import reference

# Areas and their seconds here; the long search is `python -m tests.fuzz`.
_SECONDS = {"ops": 6, "attacks": 8, "objectives": 6, "evaluation": 6, "config": 2}
_LEAST = 10  # cases, on a machine however slow


@pytest.mark.parametrize("area", AREAS)
def test_slice(area: str) -> None:
    end = time.monotonic() + _SECONDS[area]
    verdicts, number = set(), 0
    while number < _LEAST or (time.monotonic() < end and number < 300):
        outcome = run_case(area, 2026, number)
        assert outcome.verdict != FOUND, f"{outcome.line}\n{outcome.text}"
        verdicts.add(outcome.verdict)
        number += 1
    assert case.RIGHT in verdicts


def test_runner_reports_every_mistake_and_goes_on() -> None:
    outcomes = list(search("mistakes", 0, 8, limit=2.0))
    assert [o.number for o in outcomes] == list(range(8))
    verdicts = [o.verdict for o in outcomes]
    assert verdicts == [case.RIGHT, case.REFUSED, *[FOUND] * 5, case.RIGHT]
    said = ["known to be wrong", "unclear RuntimeError", "size mismatch|inconsistent tensor size"]
    said += ["Segmentation fault", "Timeout"]
    for outcome, words in zip(outcomes[2:7], said, strict=True):
        assert any(word in outcome.text for word in words.split("|")), outcome.text
    assert outcomes[2].line == "python -m tests.fuzz mistakes --seed 0 --case 2"


def test_command_exits_with_1_where_there_is_a_finding(capsys: pytest.CaptureFixture) -> None:
    assert main(["mistakes", "--case", "2"]) == 1
    assert "known to be wrong" in capsys.readouterr().out
    assert main(["mistakes", "--case", "0"]) == 0
    assert case.RIGHT in capsys.readouterr().out


def test_a_case_is_a_function_of_area_seed_and_number() -> None:
    notes = []
    for _ in range(2):
        draw = case.Draw("ops", 3, 14)
        ops.case(draw)
        notes.append(draw.notes)
        torch.rand(3)
    assert notes[0] == notes[1] and notes[0]


def _call() -> ops.Call:
    x = torch.rand(3, 5)
    args = {"x_adv": x, "grad": torch.randn(3, 5), "x": x.clone(), "alpha": 0.1, "eps": 0.2}
    return ops.Call("linf_step", args)


def test_ops_oracle_sees_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.check(_call()) == case.RIGHT
    right = reference.linf_step
    monkeypatch.setattr(
        reference, "linf_step", lambda **args: right(**args).nextafter(torch.ones(()))
    )
    with pytest.raises(case.Finding, match="result 0 differs from the reference"):
        ops.check(_call())


def test_ops_oracle_sees_a_changed_input(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.ops.linf_step

    def linf_step(x_adv, grad, x, alpha, eps, lo=0.0, hi=1.0, active=None, *, out=None):
        grad.zero_()
        return right(x_adv, grad, x, alpha, eps, lo, hi, active, out=out)

    monkeypatch.setattr(ops.ops, "linf_step", linf_step)
    with pytest.raises(case.Finding, match="changed its input grad"):
        ops.check(_call())


def test_ops_oracle_sees_a_write_beside_out() -> None:
    room = torch.zeros(3, 10)
    around = ops._around(room[:, ::2])
    room[:, ::2] = 1.0
    around("out")
    room[1, 1] = 1.0
    with pytest.raises(case.Finding, match="beside the elements of out"):
        around("out")


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("expected 3"), KeyError("eps")]
)
def test_unclear_errors_are_findings(error: Exception) -> None:
    with pytest.raises(case.Finding):
        case.require_clear(error, ["eps"])


def test_state_oracle_sees_each_change() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    changes = {
        "mode": lambda: model[1].eval(),
        "parameters": lambda: model[0].weight.data.add_(1),
        "buffers": lambda: model[1].running_mean.add_(1),
        "grads": lambda: setattr(model[0].weight, "grad", torch.ones(2, 2)),
        "requires_grad": lambda: model[0].weight.requires_grad_(False),
        "hooks": lambda: model[0].register_forward_hook(print),
        "attributes": lambda: setattr(model, "left_over", 1),
        "torch-generator": lambda: torch.rand(1),
    }
    for name, change in changes.items():
        check = case.kept_state(model)
        check()
        change()
        with pytest.raises(case.Finding, match=name):
            check()


def test_attack_oracle_sees_a_point_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.full((2, 7), 0.5), torch.tensor([0, 1])
    model = attacks.models.RowNet(7, 3, 0, torch.float32)
    attack = attacks.attacks.PGD(model, eps=0.1, steps=2, seed=0)
    result = attack.run(x, y)
    attacks.check_result(type(attack), attack, model, x, y, result, "none")
    for change, words in ((0.2, "from x in Linf"), (0.8, "outside the box")):
        result.x_adv = x + change
        with pytest.raises(case.Finding, match=words):
            attacks.check_result(type(attack), attack, model, x, y, result, "none")
    result = attack.run(x, y)
    result.correct = ~result.correct
    with pytest.raises(case.Finding, match="by its logits"):
        attacks.check_result(type(attack), attack, model, x, y, result, "none")


def test_config_oracle_sees_a_value_that_is_taken_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config.Config, "check", lambda self: None)
    texts = [run_case("config", 1, n).text for n in range(300)]
    assert any("without an error" in text for text in texts)
