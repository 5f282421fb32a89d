"""Checks of an attack's arguments, made before any work is lost."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from pyadv._names import did_you_mean
from pyadv.menus import NORMS, AnyNorm, Norm
from pyadv.ops.arguments import check_floating, parameter
from pyadv.reference.losses import has_answer

_NORMS: dict[str, AnyNorm] = {
    "linf": "Linf",
    "inf": "Linf",
    "l2": "L2",
    "2": "L2",
    "2.0": "L2",
    "l1": "L1",
    "1": "L1",
    "1.0": "L1",
    "l0": "L0",
    "0": "L0",
    "0.0": "L0",
}
_Known = TypeVar("_Known", bound=AnyNorm)
_TOLERANCE = 1e-5  # accepts pixels that rounding has put just outside the box


@overload
def canonical_norm(norm: str | float) -> Norm: ...
@overload
def canonical_norm(norm: str | float, known: tuple[_Known, ...]) -> _Known: ...
def canonical_norm(norm: str | float, known: tuple[AnyNorm, ...] = NORMS) -> AnyNorm:
    """Return the name of a norm given by name or number. Raise ValueError if it is not known."""
    name = _NORMS.get(str(norm).lower())
    if name not in known:
        *others, last = known
        numbers = ", ".join(k.removeprefix("L") for k in known)
        hint = did_you_mean(norm, known)
        raise ValueError(
            f"norm must be {', '.join(others)} or {last} (or {numbers}), got {norm!r}{hint}"
        )
    return name


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError if the value is none of the choices."""
    if isinstance(value, Tensor) or value not in choices:
        known = ", ".join(map(str, choices))
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name} must be one of {known}, got {value!r}{hint}")


def flag(name: str, value: bool) -> None:
    """Raise TypeError if the value is not True or False: the string "False" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def integer(name: str, value: int) -> int:
    """Return an integral value as an int. Raise TypeError for other types and for bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def seed(value: int) -> int:
    """Return the seed as an int. Raise an error if it is no integer in [-2^63, 2^64)."""
    seed = integer("seed", value)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {value!r}")
    return seed


def count(name: str, value: int, least: int) -> int:
    """Return the value as an int. Raise ValueError if it is no integer >= least."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def share(name: str, value: float, zero: bool = False, one: bool = False) -> None:
    """Raise an error if the value is no number in (0, 1); `zero` and `one` include an end."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (0 < value < 1 or (zero and value == 0) or (one and value == 1)):
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} must be a share in {interval}, got {value!r}")


def size(name: str, value: float | Tensor, tensor: bool = True) -> None:
    """Raise an error if a radius, step size or standard deviation is no finite number >= 0. Where
    tensors are allowed, their values are checked when they are used."""
    if isinstance(value, Tensor) and tensor:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        allowed = "a float or a Tensor" if tensor else "a float"
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def box(norm: AnyNorm, eps: float | Tensor, lo: Any, hi: Any) -> None:
    """Raise an error if numbers lo and hi are in the wrong order, or if a Linf ball covers the box
    from every point of it: that catches eps = 8 where 8/255 was meant."""
    for name, value in (("lo", lo), ("hi", hi)):
        if not isinstance(value, (int, float, Tensor, type(None))):
            raise TypeError(f"{name} must be a float, a Tensor or None, got {type(value).__name__}")
    if isinstance(lo, (int, float)) and isinstance(hi, (int, float)):
        if not lo <= hi:
            raise ValueError(f"lo must not be above hi, got lo={lo} and hi={hi}")
        if norm == "Linf" and isinstance(eps, (int, float)) and eps > hi - lo:
            raise ValueError(
                f"eps must be in units of x, whose box [{lo}, {hi}] is only {hi - lo} wide, "
                f"got {eps} (8 of 255 grey levels are 8/255)"
            )


def batch(x: Tensor, y: Tensor, ids: Tensor | None) -> None:
    """Raise an error if x, y and ids do not fit together in shape, dtype and device."""
    check_floating("attack", x=x)
    if x.dim() == 0:
        raise ValueError("attack: x must have a batch dimension, got a 0-dim tensor")
    for name, t in (("y", y), ("ids", ids)):
        if t is None and name == "ids":
            continue
        if not isinstance(t, Tensor) or t.dtype != torch.int64:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"attack: {name} must be an int64 tensor, got {got}")
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"attack: {name} must have shape [{x.shape[0]}], one value per sample of x, "
                f"got {list(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"attack: {name} must be on {x.device} as x is, got {t.device}")


def parameters(x: Tensor, given: dict[str, Any]) -> None:
    """Raise an error if a tensor parameter does not fit x by the rules of the ops."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            parameter("attack", name, value, x)


def values(x: Tensor, sizes: dict[str, float | Tensor], lo: Any, hi: Any) -> None:
    """Raise an error if sizes are negative or x has values that are not finite or outside the box.
    This reads tensor values, so a GPU has to finish its work first."""
    if x.numel() == 0:
        return
    for name, value in sizes.items():
        if isinstance(value, Tensor) and not bool((value >= 0).all()):
            raise ValueError(f"attack: {name} must be >= 0, got {float(value.min())}")
    least, most = map(float, x.aminmax())  # one pass; a NaN anywhere makes both NaN
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("attack: x has NaN or infinite values")
    below = _beyond(lo, x, least, -1)
    above = _beyond(hi, x, most, 1)
    if max(below, above) > _TOLERANCE:
        raise ValueError(
            f"attack: x must lie in the box [lo, hi] = [{_show(lo)}, {_show(hi)}], but its values "
            f"range from {least:.4g} to {most:.4g}. For inputs that are "
            "normalised, move the normalisation into the model (pyadv.models.Normalized) or pass "
            "lo and hi"
        )


def label_range(y: Tensor, classes: int) -> None:
    """Raise an error if a label is no class of the model."""
    if y.numel() == 0:
        return
    low, high = map(int, y.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"attack: y must hold labels 0..{classes - 1} (the model has {classes} classes), "
            f"got values from {low} to {high}"
        )


def logits(z: Tensor, y: Tensor) -> None:
    """Raise an error if the first logits of an attack do not fit the labels, or if a row has no
    answer: NaN, +inf, or all -inf. A class at -inf is only out of play."""
    label_range(y, z.shape[1])
    bad = int((~has_answer(z)).sum())
    if bad:
        raise ValueError(
            "attack: the model's logits must have no NaN, no +inf and one class above -inf, but "
            f"{bad} of {len(y)} samples break this on the first forward pass"
        )


def are_probabilities(z: Tensor) -> Tensor:
    """Return (B,) bool: whether a row of outputs (B, C) is nonnegative and sums to 1, as a softmax
    does, up to the square root of the dtype's precision."""
    rounding = math.sqrt(torch.finfo(z.dtype).eps)
    return (z >= 0).all(1) & ((z.float().sum(1) - 1).abs() <= rounding)


def warn_of_probabilities(z: Tensor) -> None:
    """Warn if all outputs look like probabilities."""
    if z.shape[0] and z.shape[1] > 1 and bool(are_probabilities(z).all()):
        warnings.warn(
            "the model seems to return probabilities; attacks need the logits, before the softmax, "
            "and fail where a softmax is rounded to 0 or 1",
            stacklevel=4,
        )


def _beyond(bound: float | Tensor | None, x: Tensor, extreme: float, side: int) -> float:
    """Return by how much x exceeds an upper bound (side 1) or falls below a lower bound (side -1)
    at most."""
    if bound is None:
        return 0.0
    if not isinstance(bound, Tensor):
        return side * (extreme - bound)
    bound = bound.to(x.device)
    bound = bound.reshape(-1, *(1,) * (x.dim() - 1)) if bound.dim() == 1 else bound
    return float((side * (x - bound)).max())


def _show(bound: Any) -> str:
    return "tensor" if isinstance(bound, Tensor) else str(bound)
