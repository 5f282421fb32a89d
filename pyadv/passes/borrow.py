"""Borrowing the user's model: what is attacked, where its logits are, how it is given back."""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from pyadv.menus import BatchNormMode

Output = Callable[[Any], Tensor] | str | int | None


def unwrap(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module inside a DistributedDataParallel or DataParallel wrapper, compiled or not.

    An attack needs no collectives, and ranks may attack different numbers of batches.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inside = getattr(model, "_orig_mod", model)
    return inside.module if isinstance(inside, wrappers) else model


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module that a compiled one shares its parameters with.

    Compiled graphs have no second derivatives.
    """
    return getattr(unwrap(model), "_orig_mod", unwrap(model))


def device_of(model: Callable[..., Any], x: Tensor) -> torch.device:
    """Return the device of the model's parameters, or of x if it has none."""
    return (next(model.parameters(), x) if isinstance(model, nn.Module) else x).device


# Attributes of every module that say nothing about its forward pass. Hooks are a case apart, see
# `has_hooks`; parameters, buffers and sub-modules are read one by one.
INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_LONG = 10_000  # elements from which a container is data, which no attack reads through
_SEQUENCES = (list, tuple, set, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict)


def is_atom(value: Any) -> bool:
    """Return whether `value` is a constant: nothing can change it and nothing lies inside it."""
    return type(value) in _ATOMS


@functools.cache
def _keeps_all_in_dict(kind: type) -> bool:
    """Return whether instances are plain records, whose whole state is in `__dict__`."""
    if kind is SimpleNamespace:
        return True
    room = kind.__module__.partition(".")[0]
    new: object = kind.__new__
    return (
        new is object.__new__
        and room != "torch"
        and (room not in sys.stdlib_module_names or kind.__module__ == "argparse")
        and not any("__slots__" in vars(c) for c in kind.__mro__)
        and not issubclass(kind, (nn.Module, type))
    )


def is_record(value: Any) -> bool:
    """Return whether `value` is an object of a Python class with all its state in `__dict__`."""
    kind: object = type(value)  # mypy compares a class with Hashable as if it were its instance
    return _keeps_all_in_dict(kind) and hasattr(value, "__dict__")


def inside(value: Any) -> list[Any] | None:
    """Return what a list, tuple, set, dict or record holds; None for anything else."""
    kind = type(value)
    if kind in _SEQUENCES or (isinstance(value, tuple) and kind not in _ATOMS):
        return list(value)
    if kind in _MAPPINGS:
        return [*value.keys(), *value.values()]
    return list(vars(value).values()) if is_record(value) else None


def contents(value: Any, seen: set[int] | None = None) -> list[Any]:
    """Return `value` and, for containers and records, all that they hold, to any depth.

    Args:
        seen: ids of the containers read already, whose contents are left out.
    """
    if type(value) in _ATOMS:
        return [value]
    if type(value) is MethodType:  # a new object at every look, and it would keep its object alive
        return [value.__func__]
    held = inside(value)
    if held is None or len(held) > _LONG:
        return [value]
    seen = set() if seen is None else seen
    if id(value) in seen:
        return [type(value)]
    seen.add(id(value))
    found: list[Any] = [type(value)]
    for v in held:
        if type(v) in _ATOMS:
            found.append(v)
        else:
            found += contents(v, seen)
    found.append(...)  # where the container ends
    return found


def footprint(module: nn.Module, without: frozenset[tuple[int, str]] = frozenset()) -> list[Any]:
    """Return all that a forward pass may read off the modules, for `same_footprint`.

    That is their classes, attributes, parameters and buffers, and what lies in lists, tuples, sets,
    dicts and plain records. Values that change in place (tensors, arrays, containers of more than
    10,000 elements) are the same objects.

    Args:
        without: attributes to leave out, as the number of the module and the name.
    """
    found: list[Any] = []
    seen: set[int] = set()
    for i, m in enumerate(module.modules()):
        found.append(type(m))
        for name, value in vars(m).items():
            if name in INTERNAL or (i, name) in without:
                continue
            if type(value) in _ATOMS:
                found.append(value)
            else:
                found += contents(value, seen)
        found += m._parameters.values()
        found += m._buffers.values()
    return found


def same_footprint(before: list[Any], now: list[Any]) -> bool:
    """Return whether two footprints hold the same objects."""
    return len(before) == len(now) and all(map(operator.is_, before, now))


def tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers, without the names that nn.Module's generators collect."""
    of = ((m._parameters, m._buffers) for m in module.modules())
    return [t for both in of for kind in both for t in kind.values() if t is not None]


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def is_sharded(model: Any) -> bool:
    """Return whether the processes hold parts of the model's parameters (FSDP), so that all of them
    must make every pass together."""
    # These modules are slow to import, and who shards a model has imported them. A module of FSDP2
    # is told by its class, because its parameters are whole between its pass and the next reshard.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    tensor = sys.modules.get("torch.distributed.tensor")
    names = ("FullyShardedDataParallel", "FSDPModule")
    wrappers = tuple(found for name in names if (found := getattr(fsdp, name, None)))
    part = getattr(tensor, "DTensor", ())
    if not isinstance(model, nn.Module):
        return False
    return any(isinstance(m, wrappers) for m in model.modules()) or any(
        isinstance(p, part) for p in model.parameters()
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run when the module, or one of its sub-modules, is called."""
    everywhere = any(getattr(module_hooks, f"_global_{kind}_hooks") for kind in _HOOKS)
    names = [f"_{kind}_hooks" for kind in _HOOKS]
    return everywhere or any(vars(m).get(name) for m in module.modules() for name in names)


def host_generators() -> tuple[Any, ...]:
    """Return the states of the generators of PyTorch (on the CPU), Python and NumPy."""
    state = np.random.get_state(legacy=False)["state"]
    own = {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), own


_generators_lock = threading.RLock()


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put the states of all generators back at the end.

    Gives a function that returns whether one of them has moved since the beginning. The generators
    belong to the process, so one thread at a time is in this context: none sees another's draws.
    """
    on_device = device.type == "cuda"

    def states() -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if on_device else None
        return *host_generators(), cuda

    with _generators_lock:
        before = states()
        python, legacy = random.getstate(), np.random.get_state(legacy=False)
        with torch.random.fork_rng([device] if on_device else []):
            try:
                yield lambda: states() != before
            finally:
                random.setstate(python)
                np.random.set_state(legacy)


def check_output(output: Output) -> None:
    """Raise TypeError unless `output` can say where the logits are."""
    if not (output is None or callable(output) or isinstance(output, (str, int))) or (
        isinstance(output, bool)
    ):
        raise TypeError(
            f"output must be None, a callable, a key or attribute name, or an index, got {output!r}"
        )


def pick_logits(result: Any, output: Output, samples: int | None = None) -> Tensor:
    """Return the logits (B, C) in what a model returned.

    Without `output`: a tensor, `.logits` (Hugging Face), the entry "logits" of a dict or the first
    of a tuple. `output` may be a callable, a key or attribute name, or an index.

    Raises:
        TypeError: if nothing says where the logits are.
        ValueError: if what is found is not a tensor with two dimensions, or has not one row for
            each of `samples`, where their number is given.
    """
    if callable(output):
        logits = output(result)
    elif output is not None:
        try:
            if isinstance(output, str) and not isinstance(result, dict):
                logits = getattr(result, output)
            else:
                logits = result[output]
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
    if samples is not None and len(logits) != samples:
        raise ValueError(f"the model returned {len(logits)} rows of logits for {samples} samples")
    return logits


class LeavesEvaluation(RuntimeError):
    """Raised for a model whose forward pass leaves evaluation mode or moves statistics."""


@contextlib.contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Set evaluation mode without watching the model; put back modes and buffers at the end."""
    modules = _with_modes(model)
    modes = [m.training for m in modules]
    buffers = [(b, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    try:
        _set_modes(modules, [False] * len(modules))
        yield
    finally:
        _set_modes(modules, modes)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


@contextlib.contextmanager
def borrowed(
    model: Callable[..., Any], bn: BatchNormMode = "eval", update_stats: bool = False
) -> Iterator[None]:
    """Set the modes an attack needs, and give every sub-module its own mode back at the end.

    With bn="eval" the model must stay in evaluation mode: a forward pass that changes a mode, or
    the statistics of a normalisation layer, computes something else than was asked for. Modes and
    statistics are put back and an error says so. Integer buffers, with which models count, are
    free to move.

    Modes are set as attributes, so that a `train()` of the user's own is not called.

    Args:
        bn: "eval"; "train", where BatchNorm layers use batch statistics; or "as_is", which
            changes nothing and checks nothing.
        update_stats: with bn="train", keep the running statistics that the passes have moved.

    Raises:
        LeavesEvaluation: at the end, if the model has left evaluation mode by itself.
    """
    if bn == "as_is":
        yield
        return
    modules = _with_modes(model)
    modes = [m.training for m in modules]
    batch_norms: list[nn.Module] = []
    buffers: list[tuple[Tensor, Tensor]] = []
    watch: _Statistics | None = None
    why: str | None = None
    if bn == "train":
        batch_norms = [m for m in modules if isinstance(m, _BatchNorm)]
        if not update_stats:
            buffers = [(b, b.clone()) for m in batch_norms for b in m.buffers(recurse=False)]
    elif not torch.compiler.is_compiling():
        watch = _Statistics(modules)
    try:
        _set_modes(modules, [False] * len(modules))
        _set_modes(batch_norms, [True] * len(batch_norms))
        yield
    finally:
        why = None if watch is None else watch.moved(modules)
        _set_modes(modules, modes)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
            if watch is not None and why:
                watch.restore()
    if why:
        raise LeavesEvaluation(
            f"the model was to be evaluated in evaluation mode (bn='eval'), but {why}. Modes and "
            "statistics are put back. Wrap the model so that its forward pass keeps the mode it is "
            "given: pyadv.compat.emr.official(model) passes _eval=True to the networks of EMR's "
            "official code; or attack with bn='as_is', which leaves modes and buffers to the model"
        )


def _with_modes(model: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that have a mode; torch.jit.freeze takes it away."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [m for m in modules if hasattr(m, "training")]


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        if module.training != mode:  # a module takes far longer to set an attribute than to read it
            module.training = mode


_SMALL = 1 << 16  # elements up to which a buffer of an unknown layer is saved


class _Statistics:
    """Copies of the statistics of a model's layers, to be put back if a forward pass moves them.

    These are the buffers of PyTorch's normalisation layers and the small floating-point buffers of
    the user's own modules. They are copied by one operation for each dtype.
    """

    def __init__(self, modules: list[nn.Module]):
        self._buffers: list[tuple[nn.Module, str, Tensor, int]] = []  # and their versions
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for m in modules:
            normalises = isinstance(m, _NormBase)
            kind: object = type(m)  # see `is_record`
            if not (m._buffers and (normalises or _is_users(kind))):
                continue
            for name, b in m._buffers.items():
                if b is None or b.is_inference() or b.layout != torch.strided:
                    continue
                if normalises or (b.is_floating_point() and b.numel() <= _SMALL):
                    self._buffers.append((m, name, b, b._version))
                    groups.setdefault((b.dtype, b.device), []).append(b)
        self._saved = [(group, _joined(group)) for group in groups.values()]

    def moved(self, modules: list[nn.Module]) -> str | None:
        """Return what the forward pass has changed, in words; None if nothing.

        BatchNorm changes its running mean and variance without counting a version. On the CPU
        values are compared, too; a GPU would have to be waited for, so there the count of batches,
        a mode or another buffer has to tell.
        """
        training = next((m for m in modules if m.training), None)
        if training is not None:
            return f"its forward pass sets training mode ({type(training).__name__})"
        for m, name, b, version in self._buffers:
            if b._version != version or m._buffers.get(name) is not b:
                return f"its forward pass changes a buffer ({name} of {type(m).__name__})"
        for group, saved in self._saved:
            if saved.is_cpu and not _same_bits(_joined(group), saved):
                return "its forward pass changes running statistics"
        return None

    def restore(self) -> None:
        """Put all buffers and their values back."""
        for m, name, b, _ in self._buffers:
            m._buffers[name] = b
        for group, saved in self._saved:
            parts = saved.split([b.numel() for b in group])
            for b, part in zip(group, parts, strict=True):
                b.copy_(part.view(b.shape))


@torch.no_grad()
def _joined(group: list[Tensor]) -> Tensor:
    return torch.cat([b.flatten() for b in group])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@functools.cache
def _is_users(kind: type) -> bool:
    """Return whether a class of modules is not one of PyTorch's."""
    return not kind.__module__.startswith("torch.")


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Make input gradients work inside a caller's no_grad or inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def owned(t: Tensor) -> Tensor:
    """Return t detached, as a normal tensor also if it was made under inference_mode."""
    if not t.is_inference():
        return t.detach()
    with torch.inference_mode(False):
        return t.clone()
