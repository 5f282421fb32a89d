"""Attacks on small models with random settings, right and wrong ones. A result must lie in ball and
box, agree with the model's own verdicts and not depend on the batch; an error must name a setting;
the user's model, data and random generators must be as before in either case."""

from __future__ import annotations

import contextlib
import inspect
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
    show,
)
from pyadv import attacks
from pyadv.attacks.minimum_norm import NearestIterate
from pyadv.engine.attack import Attack

KINDS = tuple(
    value
    for value in vars(attacks).values()
    if isinstance(value, type) and issubclass(value, Attack)
)
_MINIMUM = (attacks.FAB, attacks.TargetedFAB, attacks.DDN, attacks.FMN, attacks.CW)
_MINIMUM += (attacks.DeepFool, attacks.SigmaZero)
_OF_IMAGES = (attacks.Square, attacks.TransferFGSM)
_NEAREST = {"targeted", "eps", "lo", "hi", "compact", "output", "validate", "speed"}
_UNCHECKED = {"output", "seed"}  # not checked at construction
_ORDER = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}


def parameters(kind: type) -> set[str]:
    """Names of the settings of this kind of attack, its bases' included."""
    names: set[str] = set()
    for owner in (c for c in kind.__mro__ if "__init__" in vars(c)):
        if owner is NearestIterate:
            return (names | _NEAREST) - ({"targeted"} if kind is attacks.DeepFool else set())
        own = inspect.signature(owner.__init__).parameters.values()
        names |= {p.name for p in own if p.kind is p.KEYWORD_ONLY}
        if all(p.kind is not p.VAR_KEYWORD for p in own):  # nothing goes on to the base
            break
    without = {attacks.FGSM: {"steps", "alpha"}}
    without |= {attacks.TargetedAPGD: {"loss", "targeted"}, attacks.FriendlyPGD: {"best"}}
    return names - without.get(kind, set())


def case(draw: Draw) -> str:
    kind = draw.choice(KINDS)
    has = parameters(kind)
    images = issubclass(kind, _OF_IMAGES) or draw.chance(0.5)
    dtype = draw.choice(models.DTYPES)
    lo, hi = draw.choice(((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (-2.0, 3.0)))
    x, y = models.batch(draw, images, dtype, lo, hi)
    classes = draw.choice((3, 3, 4, 10))
    model = models.network(draw, x, classes, dtype)
    rowwise = not isinstance(model, models.Noisy)
    settings = _settings(draw, kind, has, x)
    settings |= {"lo": lo, "hi": hi} if (lo, hi) != (0.0, 1.0) or draw.chance(0.3) else {}
    if settings.get("lo", 0.0) == 0.0 and draw.chance(0.1):
        settings |= draw.choice(({"lo": None, "hi": None}, {"lo": -math.inf, "hi": math.inf}))
    broken = draw.chance(0.12)
    wrapping = None if broken else draw.choice((*[None] * 5, *models.OUTPUTS))
    if wrapping:
        model = models.Wrapped(model, wrapping)
        settings["output"] = models.OUTPUTS[wrapping]
    if broken:
        model = models.Failing(model, draw.choice(models.Failing.ANSWERS), draw.randint(1, 5))
    wrong = [_spoil(draw, settings, has)] if draw.chance(0.25) else []
    arguments: dict[str, Any] = {"x": _disguised(draw, x), "y": y}
    if draw.chance(0.3):
        arguments["ids"] = torch.randint(-(2**40), 2**40, y.shape, generator=draw.generator())
    if draw.chance(0.3):
        arguments["draw"] = draw.choice((0, 3, 2**31))
    if settings.get("validate") is not False and draw.chance(0.12):
        wrong.append(_spoil_arguments(draw, arguments))
    context = draw.choice((*["none"] * 4, *CONTEXTS))
    draw.note(attack=kind.__name__, settings=settings, model=model, dtype=dtype, wrong=wrong)
    draw.note(context=context, classes=classes, wrapping=wrapping, **arguments)
    if broken:
        draw.note(answers=model.answer, at=model.at)

    unchanged, state = kept(arguments), kept_state(model)
    loose = _uses_generator(settings)
    try:
        with CONTEXTS.get(context, contextlib.nullcontext)():
            attack = kind(model, **settings)
            result = attack.run(**arguments)
    except Exception as error:
        state(without=loose)
        unchanged()
        if broken and (isinstance(error, ZeroDivisionError) or not wrong):
            return _require_model_error(error, settings)
        if not (wrong or broken):
            return _require_refusal(error, settings)
        if "x" in wrong and is_of_the_model(error):  # an attack passes any shape on
            return REFUSED
        if broken:
            return _require_model_error(error, settings | dict.fromkeys(wrong))
        return require_clear(error, [*wrong, *settings, "model"])
    state(without=loose)
    unchanged()
    if broken:
        return RIGHT if model.calls[0] < model.at else _broken_result(result, model)
    if not wrong:
        check_result(kind, attack, model, arguments["x"], y, result, context)
        if rowwise and not loose and context == "none" and not callable(settings.get("start")):
            _check_batches(draw, attack, arguments, result)
    return RIGHT


def _require_refusal(error: Exception, settings: dict[str, Any]) -> str:
    """Legal settings that do not go together, such as loss="dlr" on two classes."""
    if not isinstance(error, ValueError):
        raise Finding(f"refused legal settings: {type(error).__name__}: {error}") from error
    return require_clear(error, settings, "refused legal settings: ")


def _require_model_error(error: Exception, settings: dict[str, Any]) -> str:
    if isinstance(error, ZeroDivisionError):  # the model's own
        return REFUSED
    if "does not require grad" in str(error) or "require gradients" in str(error):
        return REFUSED  # torch's words for logits without a gradient
    return require_clear(error, ["model", "logits", "output", "loss", "y", "batch_size", *settings])


def _broken_result(result: Any, model: models.Failing) -> str:
    """Only answers that are logits may pass: NaN is a misclassification after the clean pass."""
    if model.answer not in ("nan", "rows", "no grad"):
        raise Finding(f"took {model.answer} for logits")
    if model.answer == "rows" and len(result.x_adv):
        raise Finding("took another number of rows for logits")
    return RIGHT


def check_result(
    kind: type, attack: Attack, model: Any, x: Tensor, y: Tensor, result: Any, context: str
) -> None:
    """Shape, dtype, ball, box and verdict of a result."""
    s, x_adv, x = attack.settings, result.x_adv, x.detach()
    if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
        raise Finding(f"x_adv is {show(x_adv)} for x {show(x)}")
    if x_adv.requires_grad:
        raise Finding("x_adv requires grad")
    if any(getattr(result, n).shape != y.shape for n in ("correct", "loss", "kappa", "queries")):
        raise Finding("a value per sample has another shape")
    if not x_adv.isfinite().all():
        raise Finding("x_adv is not finite")
    rounding = 4 * torch.finfo(x.dtype).eps
    for bound, side in ((s.lo, -1), (s.hi, 1)):
        if bound is not None and x.numel():
            limit = torch.as_tensor(bound).to(x.dtype)
            beyond = (side * (x_adv - limit)).flatten(1).amax(1)
            if s.start == "normal_small":  # the first step projects, not the start
                beyond = beyond.where(result.steps > 0, 0)
            beyond = beyond.max()
            if float(beyond) > 0:
                raise Finding(f"x_adv lies outside the box by {float(beyond):.3e}")
    fooled = result.logits.argmax(1) != y
    fooled = ~fooled if s.loss.targeted else fooled
    confident = s.loss.confidence == 0.0
    minimum = isinstance(attack, _MINIMUM)
    if not minimum and not callable(s.start) and x.numel() and s.start != "normal_small":
        d = x_adv.double() - x.double()
        if getattr(s.rule, "pixels", False):  # eps counts pixels, whatever their channels
            d = d.abs().amax(1)
        d = d.flatten(1)
        length = torch.linalg.vector_norm(d, _ORDER[s.norm], dim=1)
        eps = torch.as_tensor(s.eps).double().reshape(-1)
        size = x.double().abs().flatten(1).amax(1).clamp(min=1.0)
        # Rounding of each entry of x_adv adds up.
        n = d.shape[1] ** (0 if s.norm == "Linf" else 0.5 if s.norm == "L2" else 1)
        allowed = eps * (1 + 1e-5) + rounding * size * n
        if bool((length > allowed).any()):
            worst = (length - allowed).argmax()
            raise Finding(
                f"x_adv lies {float(length[worst])} from x in {s.norm}, eps {show(s.eps)}"
            )
    if s.bn == "eval" and not s.loss.by_autograd and confident:
        still = ~fooled
        if minimum and attack.eps is not None and x.numel():
            eps = torch.as_tensor(attack.eps).double()
            far = result.distances.double() > eps * (1 + 1e-6)
            still, result_correct = still | far, result.correct | (fooled & ~result.correct & far)
            same = torch.equal(still, result_correct)
        else:
            same = torch.equal(still, result.correct)
        if not same:
            raise Finding(
                f"correct is {result.correct.tolist()}, and by its logits {still.tolist()}"
            )
    if context == "none" and s.bn == "eval" and len(x):
        again = _logits(model, x_adv, s.output)
        size = max(1.0, float(again.double().abs().max()))
        if float((again.double() - result.logits.double()).abs().max()) > 64 * rounding * size:
            raise Finding("the logits are not those of x_adv")


def _logits(model: nn.Module, x: Tensor, output: Any) -> Tensor:
    from pyadv.passes.borrow import borrowed, pick_logits

    with torch.no_grad(), borrowed(model):
        return pick_logits(model(x), output)


def _check_batches(draw: Draw, attack: Attack, arguments: dict[str, Any], result: Any) -> None:
    """The same samples in another order, and each alone, must get the same examples."""
    x, y, ids = (arguments.get(n) for n in ("x", "y", "ids"))
    n, when = len(y), arguments.get("draw", 0)
    if n < 2 or any(isinstance(v, Tensor) and v.dim() for v in _sizes(attack)):
        return
    order = torch.randperm(n, generator=draw.generator())
    parts = [order, torch.tensor([draw.randrange(n)])]
    for rows in parts:
        part = (x.detach()[rows], y[rows], None if ids is None else ids[rows], when)
        other = attack.run(*part)
        for name in ("x_adv", "correct", "kappa", "queries"):
            a, b = getattr(result, name)[rows], getattr(other, name)
            if not torch.equal(a, b):
                raise Finding(f"{name} depends on the batch: rows {rows.tolist()}")


def _sizes(attack: Attack) -> tuple[Any, ...]:
    s = attack.settings
    own = (getattr(s, name, None) for name in ("alpha", "keep"))
    return (s.eps, *own, s.lo, s.hi, getattr(attack, "eps", None))


def _uses_generator(settings: dict[str, Any]) -> tuple[str, ...]:
    """What may change: starts of the official codes draw from torch's generator."""
    words = (settings.get("start"), settings.get("draws"))
    loose = (
        ()
        if not {"uniform", "normal_small", "generator", "official"}
        & set(w for w in words if isinstance(w, str))
        else ("torch-generator",)
    )
    if settings.get("update_stats"):
        loose += ("buffers",)
    return loose


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.gather(1, y[:, None])[:, 0]


def _settings(draw: Draw, kind: type, has: set[str], x: Tensor) -> dict[str, Any]:
    """Legal settings, few of them not the default."""
    eps: Any = draw.choice((0.1, 0.03, 0.5, 0, 1.0, 1e-6))
    if draw.chance(0.25):
        eps = torch.rand(len(x), generator=draw.generator()) * 0.3
    options: dict[str, tuple[Any, ...]] = {
        "norm": ("Linf", "L2", "L1", 2, math.inf, "linf"),
        "alpha": (0.02, 0.3, 0.0, torch.tensor(0.05)),
        "loss": ("ce", "margin", "slm", "dlr", _margin),
        "restarts": (1, 2, 3),
        "best": ("last", "loss", "fooled"),
        "eot": (1, 2),
        "targeted": (False, True),
        "keep": (0.2, 1.0, 0.01),
        "bn": ("eval", "train", "as_is"),
        "update_stats": (False, True),
        "compact": ("auto", True, False),
        "grad_mode": ("fused", "autograd"),
        "scale": (None, "unit", "exact"),
        "validate": ("auto", True, False),
        "speed": ("exact", "fast", "bfloat16"),
        "graph": ("auto", False),
        "tau": (0, 1, 5),
        "omega": (0.0, 0.01),
        "decay": (0.0, 0.9, 1),
        "rho": (0.75, 0.1, 1.0),
        "multi_eps": (None, False),
        "zero_first_check": (True, False),
        "targets": (1, 2, 20),
        "p": (0.8, 0.05, 1),
        "draws": ("keyed", "official"),
        "early_stop": (False, True),
        "alpha_max": (0.1, 0.0, 1.0),
        "eta": (1.05, 1),
        "beta": (0.9, 0.5),
        "gamma": (0.05, 0.5),
        "gamma_final": (0.001, 0.5),
        "overshoot": (0.02, 0.0),
        "classes": (2, 10),
        "confidence": (0.0, 0.5),
        "lr": (0.01, 0.5),
        "c": (0.001, 10.0, 0),
        "abort_early": (True, False),
        "start_radius": (None, 0.1, 0.0),
        "start": ("keyed", "none", "uniform", "normal_small", lambda t: t.clone()),
    }
    if issubclass(kind, attacks.APGD):
        options["start"] = ("keyed", "none", "generator", lambda t: t.clone())
        options["best"] = ("fooled", "loss")
    if issubclass(kind, _MINIMUM) or kind is attacks.PGD0:  # one size for all samples
        options["alpha"] = (0.02, 0.3, 0.0)
    if kind is attacks.DDN:
        options.pop("norm")
    if kind is attacks.DeepFool:
        options["norm"] = ("L2", "Linf")
    if kind is attacks.FMN:
        options["norm"] = (*options["norm"], "L0", 0)
    if kind in (attacks.DDN, attacks.CW, attacks.FMN):
        options["classes"] = ("nearest", "runner-up")
    if kind is attacks.DeepFool and draw.chance(0.3):
        options |= {"norm": ("L2",), "variant": ("super",)}
    if kind is attacks.PGD0:
        eps = torch.arange(len(x)) if isinstance(eps, Tensor) else draw.choice((0, 1, 3, 10**6))
        options |= {"start": ("keyed", "none"), "pixels": (False, x.dim() == 4)}
    settings: dict[str, Any] = {"seed": draw.choice((0, 7, 2**40))}
    settings["steps" if "steps" in has else "queries"] = draw.choice((0, 1, 2, 4, 5))
    if kind is attacks.CW:
        settings |= {"steps": draw.choice((1, 3)), "searches": draw.choice((1, 2))}
    if kind not in _MINIMUM or draw.chance(0.6):
        settings["eps"] = eps
    if kind is attacks.Admix:
        settings["images"] = x.detach().clone()
    names = [n for n in sorted(options) if n in has]
    for name in draw.sample(names, min(len(names), draw.choice((0, 1, 2, 3, 4)))):
        settings[name] = draw.choice(options[name])
    if settings.get("bn") == "as_is":
        settings.pop("bn")  # dropout draws; the caller asked for it
    if kind is attacks.FGSM:
        settings.pop("steps", None)
    return {n: v for n, v in settings.items() if n in has}


def _spoil(draw: Draw, settings: dict[str, Any], has: set[str]) -> str:
    """One setting becomes something that somebody might pass by mistake."""
    name = draw.choice([*sorted(has - _UNCHECKED), "stepz"])
    options: list[Any] = [-1, -0.5, math.nan, math.inf, None, "0.1", "x", True, [0.1], {}, object()]
    if name in ("eps", "alpha", "lo", "hi"):
        options += [torch.rand(77), torch.tensor(-1.0), torch.tensor(math.nan)]
        options += [torch.rand(2, 9, 9, 9, 9, 9), torch.tensor(0.5, dtype=torch.complex64)]
    settings[name] = draw.choice(options)
    return name


def _spoil_arguments(draw: Draw, arguments: dict[str, Any]) -> str:
    name = draw.choice(list(arguments))
    value = arguments[name]
    if name == "draw":
        arguments[name] = draw.choice((-1, 2**62, None, True))
        return name
    options = [None, 3, "x", [1, 2], value[None], value.to("meta"), value.bool()]
    options += [value[:-1], value[:0], torch.zeros(()), value.to(torch.int32)]
    if name == "x":
        options += [value * math.nan, value + 5, value - math.inf, value.flatten(), value.numpy]
    if name == "y":
        options += [value + 100, value - 1, value.double(), value + 2**40]
    arguments[name] = draw.choice(options)
    return name


def _disguised(draw: Draw, x: Tensor) -> Tensor:
    kind = draw.choice(("plain", "plain", "requires_grad", "inference", "strided", "expanded"))
    if kind == "requires_grad":
        return x.clone().requires_grad_()
    if kind == "inference":
        with torch.inference_mode():
            return x.clone()
    if kind == "strided":
        return x.clone().transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "expanded" and len(x) > 1:
        return x[:1].expand(x.shape)
    return x


CONTEXTS: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "meta by default": lambda: torch.device("meta"),
}
