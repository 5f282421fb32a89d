"""The user's model, borrowed: what is attacked, how its logits are found, and how it is given
back."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

Output = Callable[[Any], Tensor] | str | int | None


def unwrap(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module inside a DistributedDataParallel or DataParallel wrapper, also a compiled one: an
    attack needs no collectives, and ranks may attack different numbers of batches."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inside = getattr(model, "_orig_mod", model)
    return inside.module if isinstance(inside, wrappers) else model


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module a compiled one shares its parameters with: compiled graphs have no second
    derivatives."""
    return getattr(unwrap(model), "_orig_mod", unwrap(model))


def device_of(model: Callable[..., Any], x: Tensor) -> torch.device:
    """Where the model computes: at its parameters, or where x is."""
    return (next(model.parameters(), x) if isinstance(model, nn.Module) else x).device


def footprint(module: nn.Module) -> list[Any]:
    """All that a forward pass may read off the modules, to be compared one by one with `is`: their
    attributes, parameters and buffers. What lies inside lists and dicts is not seen."""
    seen: list[Any] = []
    for m in module.modules():
        seen += (*vars(m).values(), *m._parameters.values(), *m._buffers.values())
    # A method that is bound to the model would keep it alive.
    return [v.__func__ if type(v) is MethodType else v for v in seen]


def same_footprint(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def tensors(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers; faster than the generators of nn.Module, which collect names."""
    of = ((m._parameters, m._buffers) for m in module.modules())
    return [t for both in of for kind in both for t in kind.values() if t is not None]


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, or one in it, does more than its forward."""
    everywhere = any(getattr(module_hooks, f"_global_{kind}_hooks") for kind in _HOOKS)
    names = [f"_{kind}_hooks" for kind in _HOOKS]
    return everywhere or any(vars(m)[name] for m in module.modules() for name in names)


def check_output(output: Output) -> None:
    """Raise TypeError unless `output` can say where the logits are."""
    if not (output is None or callable(output) or isinstance(output, (str, int))) or (
        isinstance(output, bool)
    ):
        raise TypeError(
            f"output must be None, a callable, a key or attribute name, or an index, got {output!r}"
        )


def pick_logits(result: Any, output: Output) -> Tensor:
    """The logits (B, C) in what a model returned.

    Without `output`: a tensor, `.logits` (Hugging Face), the entry "logits" of a dict or the first
    of a tuple. `output` may be a callable, a key or attribute name, or an index.
    """
    if callable(output):
        logits = output(result)
    elif output is not None:
        try:
            by_name = isinstance(output, str) and not isinstance(result, dict)
            logits = getattr(result, output) if by_name else result[output]
        except (KeyError, IndexError, AttributeError, TypeError):
            keys = f"; it has {', '.join(map(str, result))}" if isinstance(result, dict) else ""
            raise ValueError(
                f"output={output!r} finds nothing in the {type(result).__name__} that the model "
                f"returned{keys}"
            ) from None
    elif isinstance(result, Tensor):
        logits = result
    elif hasattr(result, "logits"):
        logits = result.logits
    elif isinstance(result, dict) and "logits" in result:
        logits = result["logits"]
    elif isinstance(result, (tuple, list)) and result:
        logits = result[0]
    else:
        raise TypeError(
            f"the model returned a {type(result).__name__}; say with output= where its logits are"
        )
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape [batch, classes], got {got}")
    return logits


@contextlib.contextmanager
def borrowed(
    model: Callable[..., Any], bn: str = "eval", update_stats: bool = False
) -> Iterator[None]:
    """Evaluation mode for the time of an attack, every sub-module's own mode back afterwards, also
    after an exception.

    With bn="train" BatchNorm layers use batch statistics; the running ones are put back unless
    `update_stats`. With bn="as_is" the model stays in whatever mode it is. Flags are set directly,
    so that a `train()` of the user's own has no part in it.
    """
    if bn == "as_is":
        yield
        return
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [m.training for m in modules]
    batch_norms: list[nn.Module] = []
    buffers: list[tuple[Tensor, Tensor]] = []
    if bn == "train":
        batch_norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not update_stats:
            buffers = [(b, b.clone()) for m in batch_norms for b in m.buffers(recurse=False)]
    try:
        _set_modes(modules, [False] * len(modules))
        _set_modes(batch_norms, [True] * len(batch_norms))
        yield
    finally:
        _set_modes(modules, modes)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        if module.training != mode:  # a module takes far longer to set an attribute than to read it
            module.training = mode


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients with respect to the input work inside a caller's no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def owned(t: Tensor) -> Tensor:
    """Detached, and a normal tensor even if the caller made it, or calls, under inference_mode."""
    if not t.is_inference():
        return t.detach()
    with torch.inference_mode(False):
        return t.clone()
