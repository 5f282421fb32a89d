"""What all areas share: the draws of a case, its verdicts, and the state that must not change."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RIGHT, REFUSED = "right result", "clear error"


class Finding(Exception):
    """A case that ended in neither a right result nor a clear error."""


class Draw(random.Random):
    """The random numbers of one case, a function of (area, seed, number), and notes on what was
    drawn, which a finding prints."""

    def __new__(cls, *args: Any) -> Draw:
        return super().__new__(cls)

    def __init__(self, area: str, seed: int, number: int):
        super().__init__(f"{area} {seed} {number}")
        self.number = number
        self.notes: dict[str, str] = {}

    def chance(self, share: float) -> bool:
        return self.random() < share

    def generator(self) -> torch.Generator:
        return torch.Generator(device="cpu").manual_seed(self.getrandbits(62))

    def note(self, **values: Any) -> None:
        self.notes |= {name: show(value) for name, value in values.items()}


def show(value: Any) -> str:
    """A short text of any value; tensors by their properties."""
    if isinstance(value, Tensor):
        strides = list(value.stride()) if value.layout == torch.strided else value.layout
        text = f"Tensor({list(value.shape)}, strides {strides}, {value.dtype}, {value.device}"
        plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        if plain and 0 < value.numel() <= 8:
            text += f", {value.detach().tolist()}"
        flags = [f for f in ("requires_grad",) if getattr(value, f)]
        flags += ["inference"] if value.is_inference() else []
        return ", ".join([text, *flags]) + ")"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return repr(value)[:200]


def is_of_the_model(error: BaseException) -> bool:
    """Whether the error comes from within a layer of the model."""
    return any(
        frame.f_code is nn.Module._call_impl.__code__
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def require_clear(error: BaseException, names: Iterable[str], where: str = "") -> str:
    """Return REFUSED if the error is one that a user can act on: a TypeError or a ValueError, or a
    RuntimeError of pyadv, whose message has one of the names as a word. Raise Finding else."""
    message, names = str(error), list(names)
    ours = isinstance(error, (TypeError, ValueError)) or (
        isinstance(error, RuntimeError) and "pyadv" in message
    )
    if not ours:
        raise Finding(f"{where}unclear {type(error).__name__}: {message[:400]}") from error
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names):
        raise Finding(
            f"{where}{type(error).__name__} names none of {', '.join(names)}: {message[:400]}"
        ) from error
    return REFUSED


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal element for element, NaN where NaN is."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(torch.nan_to_num(a, nan=0.0), torch.nan_to_num(b, nan=0.0))
        and torch.equal(a.isnan(), b.isnan())
    )


def kept(tensors: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that raises Finding where one of the tensors has changed since now."""
    strided = {
        name: t
        for name, t in tensors.items()
        if isinstance(t, Tensor) and t.layout == torch.strided and not (t.is_meta or t.is_quantized)
    }
    with torch.inference_mode(False), torch.no_grad():
        before = {name: t.detach().clone() for name, t in strided.items()}

    def check() -> None:
        with torch.no_grad():
            for name, t in strided.items():
                if not same_bits(t.detach(), before[name]):
                    raise Finding(f"changed its input {name}")

    return check


def kept_state(model: Any) -> Callable[..., None]:
    """Return a function that raises Finding where the process or the model is not as it is now.

    It looks at the modes, parameters, gradients, buffers and hooks of the model, at its attributes,
    at the random generators of torch, NumPy and Python, and at torch's switches. `without` names
    what may have changed.
    """
    now = dict(_state(model))

    def check(without: tuple[str, ...] = ()) -> None:
        after = dict(_state(model))
        for name in now.keys() | after.keys():
            if name.split(" ")[0] in without:
                continue
            a, b = now.get(name), after.get(name)
            same = same_bits(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            if not same:
                raise Finding(f"changed the user's state: {name}")

    return check


def _state(model: Any) -> Iterator[tuple[str, Any]]:
    yield "torch-generator", torch.get_rng_state()
    state = np.random.get_state(legacy=False)["state"]
    yield "numpy-generator", (state["key"].tobytes(), state["pos"])
    yield "python-generator", hash(random.getstate())
    yield "grad-mode", torch.is_grad_enabled()
    yield "inference-mode", torch.is_inference_mode_enabled()
    yield "autocast", torch.is_autocast_enabled("cpu")
    yield "default-dtype", torch.get_default_dtype()
    yield "threads", torch.get_num_threads()
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        yield f"mode of {name}", module.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            yield f"hooks {kind} of {name}", tuple(getattr(module, kind))
        yield (
            f"attributes of {name}",
            tuple(sorted(k for k in vars(module) if not k.startswith("__"))),
        )
    for name, p in model.named_parameters():
        yield f"parameters {name}", p.detach().clone()
        yield f"identity of {name}", id(p)
        yield f"requires_grad of {name}", p.requires_grad
        yield f"grads {name}", None if p.grad is None else p.grad.clone()
    for name, b in model.named_buffers():
        yield f"buffers {name}", b.detach().clone()
