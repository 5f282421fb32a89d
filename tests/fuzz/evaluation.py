"""Evaluations of small models. The clean row must be the model's own verdict, no attack may make a
sample right, the verdicts must not depend on batches or order, and a state file must give the same
report again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz import models
from fuzz.case import RIGHT, Draw, Finding, kept, kept_state, require_clear
from pyadv import attacks
from pyadv.evaluation import evaluate

_UNCHECKED = {"progress", "chunk", "attacks", "eps"}  # not looked at before they are used
_SHORT = {"apgd-ce": 3, "apgd-dlr": 3, "apgd-t": 2, "fab": 2, "fab-t": 2, "square": 5}


def case(draw: Draw) -> str:
    dtype = draw.choice((torch.float32, torch.float64))
    x, y = models.batch(draw, True, dtype)
    rowwise = draw.chance(0.8)
    model = models.network(draw, x, 4, dtype, rowwise)
    norm, eps = draw.choice(("Linf", "L2", "L1", 2)), draw.choice((0.1, 0.5, 0, 1))
    arguments: dict[str, Any] = {"norm": norm, "eps": eps, "batch_size": draw.choice((1, 2, 500))}
    arguments |= {"seed": draw.choice((0, 3)), "progress": None}
    arguments["attacks"] = _attacks(draw, model, norm, eps)
    data: Any = x
    labels: Tensor | None = y
    if draw.chance(0.4) and len(x):
        size = draw.choice((1, 2, 4))
        data, labels = list(zip(x.split(size), y.split(size), strict=True)), None
        arguments["chunk"] = draw.choice((1, 3, 4096))
    wrong = [] if len(x) else ["data", "y", "sample"]
    if draw.chance(0.25):
        wrong.append(draw.choice([n for n in arguments if n not in _UNCHECKED]))
        arguments[wrong[-1]] = draw.choice((None, "pgd", -1, 0, 1.5, [1], {}, object(), True))
    draw.note(what="evaluate", x=x, y=labels, wrong=wrong, model=model, **arguments)
    unchanged, state = kept({"x": x, "y": y}), kept_state(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt" if not wrong and draw.chance(0.4) else None
        try:
            report = evaluate(model, data, labels, state=file, **arguments)
        except Exception as error:
            state()
            unchanged()
            if not wrong:
                raise Finding(f"refused a legal call: {type(error).__name__}: {error}") from error
            return require_clear(error, [*wrong, "attacks", "attack"])
        state()
        unchanged()
        if wrong:
            return RIGHT
        check_report(report, model, x, y)
        if file is not None:
            again = evaluate(model, data, labels, state=file, **arguments)
            _require_equal(report, again, None, "the state file")
    if rowwise and len(x) > 1:
        order = torch.randperm(len(x), generator=draw.generator())
        arguments["batch_size"] = draw.choice((1, 3, 100))
        arguments.pop("chunk", None)
        _require_equal(report, evaluate(model, x[order], y[order], **arguments), order, "the order")
    return RIGHT


def check_report(report: Any, model: Any, x: Tensor, y: Tensor) -> None:
    """The clean row and the examples against the model itself."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        clean = model(x).argmax(1) == y
        rows, x_adv = report.findings.examples()
        if len(rows) and bool((model(x_adv).argmax(1) == y[rows]).any()):
            raise Finding("an example does not fool the model")
    for module, mode in modes:
        module.training = mode
    if not torch.equal(report["clean"].correct, clean):
        raise Finding("the clean row is not the model's verdict")
    for row in report.rows:
        if bool((row.correct & ~clean).any()):
            raise Finding(f"{row.name} makes samples right that are wrong at x")
    if report.worst.accuracy > min(row.accuracy for row in report.rows):
        raise Finding("the worst case is above a row")
    broken = clean & ~report.worst.correct
    if not torch.equal(rows.sort()[0], broken.nonzero()[:, 0]):
        raise Finding("there is not one example for each sample that was broken")
    for text in (report.to_markdown(), str(report)):
        if f"{len(y):,} samples" not in text:
            raise Finding("the report does not say its number of samples")


def _require_equal(report: Any, other: Any, order: Tensor | None, what: str) -> None:
    for a, b in zip(report.rows, other.rows, strict=True):
        correct = a.correct if order is None else a.correct[order]
        if a.name != b.name or not torch.equal(correct, b.correct):
            raise Finding(f"{a.name} depends on {what}")


def _attacks(draw: Draw, model: Any, norm: Any, eps: float) -> Any:
    kind = draw.choice(("name", "own", "own", "own", "members", "members"))
    if kind == "name":
        return "pgd20"
    common = {"norm": norm, "eps": eps, "steps": 3, "seed": 1}
    if kind == "own":
        several = {
            "pgd": attacks.PGD(**common),
            "apgd": attacks.APGD(**common, restarts=2),
            "square": attacks.Square(norm=norm, eps=eps, queries=4, seed=1),
            "fab": attacks.FAB(**common),
        }
        return {n: several[n] for n in draw.sample(sorted(several), draw.choice((1, 2)))}
    version = draw.choice(("standard", "plus", "rand", "custom"))
    names = draw.sample(sorted(_SHORT), 2) if version == "custom" else None
    ensemble = attacks.AutoAttack(
        model, norm=norm, eps=eps, version=version, attacks=names, seed=1, progress=None
    )
    for name, member in ensemble.plan.items():
        member.steps, member.restarts = _SHORT[name], min(member.restarts, 2)
        member.eot, member.targets = min(member.eot, 2), min(member.targets, 2)
    return ensemble
