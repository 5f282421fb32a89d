"""Training objectives put together at random. The loss must be finite or the error clear; gradients
reach parameters only; BatchNorm statistics move once for each forward pass in train mode; where the
loss is smooth, the gradient is that of finite differences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import models
from fuzz.case import (
    REFUSED,
    RIGHT,
    Draw,
    Finding,
    is_of_the_model,
    kept,
    kept_state,
    require_clear,
)
from pyadv import objectives as o
from pyadv.attacks import PGD, FriendlyPGD
from pyadv.ops import NormProduct

# Forward passes in train mode.
_PASSES = {"Standard": 1, "AT": 1, "FAT": 1, "TRADES": 2, "MART": 2, "GAIRAT": 1, "GAIRTRADES": 2}
_PASSES |= {"GAIRMART": 2, "GAIRRST": 3}
# Schedules and epochs that are looked at when they are used, with errors of their own.
_UNCHECKED = {"beta", "lam", "begin_epoch", "slope", "bias", "tau"}
_SMOOTH = ("Standard", "AT", "FAT", "TRADES", "MART")


class Smooth(nn.Module):
    """A small network in float64 with derivatives of all orders."""

    def __init__(self, n: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(n, 4), nn.Tanh(), nn.Linear(4, classes))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def case(draw: Draw) -> str:
    smooth = draw.chance(0.4)
    dtype = torch.float64 if smooth else draw.choice((torch.float32, torch.float64))
    x, y = models.batch(draw, True, dtype)
    while len(x) < 2:  # BatchNorm in train mode wants more than one value; means of none are NaN
        x, y = models.batch(draw, True, dtype)
    if smooth:
        with torch.random.fork_rng():
            torch.manual_seed(draw.getrandbits(20))
            model: nn.Module = Smooth(math.prod(x.shape[1:]), 3)
    else:
        model = models.network(draw, x, 3, dtype)
    model.train()
    wrong: list[str] = []
    try:
        name, objective = _objective(draw, model, x, smooth, wrong)
    except Exception as error:
        if not wrong:
            raise Finding(f"refused legal settings: {type(error).__name__}: {error}") from error
        return require_clear(error, wrong)
    arguments: dict[str, Any] = {"x": x, "y": y, "epoch": draw.choice((1, 1, 2, 7))}
    if name == "GAIRRST" and draw.chance(0.7):
        arguments["y"] = y.where(torch.arange(len(y)) % 2 == 0, -1)
    if draw.chance(0.3):
        arguments["ids"] = torch.arange(len(y))
    if draw.chance(0.15):
        which = draw.choice(("y", "epoch") if name == "Standard" else ("x", "y", "epoch"))
        wrong.append(which)
        arguments[which] = draw.choice(
            (None, "1", 0, -1, 1.5, y[:1], y.double(), y + 7, x * math.nan, x[:1], x + 3, True)
        )
    draw.note(objective=name, wrong=wrong, smooth=smooth, model=model, **arguments)
    # Running statistics may move in train mode, and power iteration has vectors of its own.
    loose = ("buffers", "grads")
    if any(isinstance(m, nn.Dropout) for m in model.modules()) or objective.draws:
        loose += ("torch-generator",)
    unchanged, state = kept(arguments), kept_state(model)
    counts = [(m, int(m.num_batches_tracked)) for m in _batch_norms(model)]
    try:
        loss = objective.objective(model, **arguments)
    except Exception as error:
        state(without=loose)
        unchanged()
        if not wrong:
            raise Finding(f"refused a legal step: {type(error).__name__}: {error}") from error
        if "x" in wrong and is_of_the_model(error):  # an objective passes any shape on
            return REFUSED
        # Losses of a step are the ops', and say logits where x is wrong.
        return require_clear(error, [*wrong, "logits", "attack", "labels"])
    state(without=loose)
    unchanged()
    if wrong:
        return RIGHT
    if not isinstance(loss, Tensor) or loss.dim() or not bool(loss.isfinite()):
        raise Finding(f"the loss is {loss!r}")
    for module, count in counts:
        moved = int(module.num_batches_tracked) - count
        if objective.passes is not None and moved != objective.passes:
            raise Finding(f"BatchNorm saw {moved} batches, expected {objective.passes}")
    _check_gradients(model, x, loss)
    if smooth and objective.smooth:
        _check_differences(objective, model, arguments)
    return RIGHT


class _Made:
    """An objective and what is known of it."""

    def __init__(self, objective: o.Objective, passes: int | None, smooth: bool, draws: bool):
        self.objective, self.passes, self.smooth, self.draws = objective, passes, smooth, draws


def _objective(
    draw: Draw, model: nn.Module, x: Tensor, smooth: bool, wrong: list[str]
) -> tuple[str, _Made]:
    name = draw.choice([*_PASSES, "MAIL"])
    steps = 0 if smooth and name in _SMOOTH else draw.choice((1, 2, 3))
    common = {"eps": draw.choice((0.1, 0.3)), "alpha": 0.05, "steps": steps, "seed": 0}
    kl = name in ("TRADES", "GAIRTRADES", "GAIRRST") or (name == "MAIL" and draw.chance(0.4))
    common["loss"] = "kl" if kl else draw.choice(("ce", "margin", "slm"))
    common["speed"] = draw.choice(("exact", "exact", "fast"))
    friendly = name == "FAT" or (name not in ("GAIRRST",) and draw.chance(0.2))
    attack = FriendlyPGD(tau=draw.choice((0, 1)), **common) if friendly else PGD(**common)
    beta: Any = draw.choice((6.0, 1, 0.0, lambda epoch: 0.5 * epoch))
    lam: Any = draw.choice((-1.0, 0, math.inf, lambda epoch: -1.0 / epoch))
    tau = draw.choice((None, 1, o.fat_tau)) if friendly else None
    begin = draw.choice((1, 2, 50))
    settings: dict[str, Any] = {}
    if name == "FAT":
        settings = {"tau": tau}
    elif name in ("TRADES", "MART"):
        settings = {"beta": beta, "tau": tau}
        if name == "MART":
            settings["exact"] = draw.chance(0.5)
    elif name == "GAIRAT":
        settings = {"lam": lam, "kind": draw.choice(("tanh", "sigmoid", "discrete")), "tau": tau}
        settings |= {"begin_epoch": begin, "int_half": draw.chance(0.5)}
    elif name in ("GAIRTRADES", "GAIRMART"):
        settings = {"beta": beta, "lam": lam, "begin_epoch": begin, "tau": tau}
        if name == "GAIRTRADES":
            settings["weight_on"] = draw.choice(("kl", "ce", "both"))
    elif name == "GAIRRST":
        settings = {"beta": beta, "lam": draw.choice((3.0, 100.0))}
    elif name == "MAIL":
        base = "trades" if kl else draw.choice(("at", "mart"))
        settings = {"base": base, "margin": draw.choice(("adv", "nat", "dif", "dif_conf"))}
        settings |= {"slope": draw.choice((10.0, -3.0)), "bias": draw.choice((-0.5, 0.2))}
        settings |= {"beta": beta, "normalize": draw.choice(("mean", "x3", "none"))}
        settings |= {"begin_epoch": begin, "tau": tau}
    draw.note(settings=settings, attack_settings=common, friendly=friendly)
    if settings and draw.chance(0.2):
        which = draw.choice([*sorted(settings.keys() - _UNCHECKED), "stepz"])
        settings[which] = draw.choice((None, "x", -1, [1], math.nan, object(), 2.5))
        wrong.append(which)
        draw.note(settings=settings)
    if name == "Standard":
        made: o.Objective = o.Standard()
    elif name == "GAIRRST":
        made = o.GAIRRST(attack, PGD(**common | {"loss": "margin"}), **settings)
    else:
        made = getattr(o, name)(attack, **settings)
    passes: int | None = _PASSES.get(name)
    if name == "MAIL":
        passes = 1 if settings["base"] == "at" and settings["margin"] == "adv" else 2
    if name == "GAIRRST" and settings["lam"] == 100.0:
        passes = 2
    added, draws = [], False
    is_smooth = smooth and name in _SMOOTH
    measured = any(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    if measured and draw.chance(0.3):
        kind = draw.choice(("frobenius", "spectral"))
        product = NormProduct(model, x.shape[1:], kind, draw.choice(("reshape", "bound")))
        added.append(o.NormPenalty(draw.choice((0.01, 0)), product))
        is_smooth = is_smooth and kind == "frobenius"
    if draw.chance(0.3) and name != "GAIRRST":
        options: dict[str, Any] = {"temperature": draw.choice((1.0, 40.0))}
        options |= {"of": draw.choice(("softmax", "pairwise", "jacobian"))}
        options |= {"derivative": draw.choice(("tangent", "double", "difference"))}
        options |= {"center": draw.chance(0.3), "reduction": draw.choice(("mean", "official"))}
        options |= {"samples": draw.choice((None, None, 2))}
        draws |= options["samples"] is not None
        added.append(o.EMR(draw.choice((0.1, lambda epoch: 0.01)), **options))
        is_smooth = (
            is_smooth
            and options["of"] == "jacobian"
            and options["derivative"] != ("difference")
            and options["samples"] is None
        )
    for regulariser in added:
        made = made + regulariser
    if draw.chance(0.2):
        weights = [n for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
        if not any("weight" in n for n in weights):
            wrong.append("AWP")
        made = o.AWP(made, gamma=draw.choice((0.01, 0.0)), begin_epoch=draw.choice((1, 3)))
        is_smooth = False
    draw.note(regularisers=[type(a).__name__ for a in added], awp=isinstance(made, o.AWP))
    return name, _Made(made, passes, is_smooth, draws)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _check_gradients(model: nn.Module, x: Tensor, loss: Tensor) -> None:
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if loss.requires_grad:
        loss.backward()
    if x.grad is not None:
        raise Finding("x has a gradient")
    for p, grad in zip(model.parameters(), before, strict=True):
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            raise Finding("a gradient is not finite")
        if not p.requires_grad and (p.grad is None) != (grad is None):
            raise Finding("a frozen parameter has a gradient")


def _check_differences(made: _Made, model: nn.Module, arguments: dict[str, Any]) -> None:
    """Along one random direction, with the same adversarial examples."""
    objective, weights = made.objective, [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(0)
    along = [torch.randn(w.shape, generator=g, dtype=w.dtype) for w in weights]
    if not weights:
        return

    def loss_at(share: float) -> Tensor:
        if objective.attack is not None:
            objective.attack.draw = 0
        with torch.no_grad():
            for w, d in zip(weights, along, strict=True):
                w += share * d
        return objective(model, **arguments)

    grads = torch.autograd.grad(loss_at(0.0), weights, allow_unused=True)
    slope = sum(float((v * d).sum()) for v, d in zip(grads, along, strict=True) if v is not None)
    step = 1e-5
    difference = float(loss_at(step).detach() - loss_at(-2 * step).detach()) / (2 * step)
    if abs(slope - difference) > 1e-5 * max(1.0, abs(slope)):
        raise Finding(f"the gradient along a direction is {slope}, by differences {difference}")
