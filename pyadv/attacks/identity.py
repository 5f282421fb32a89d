"""Identities of models and attacks, which a saved evaluation is compared by.

An identity is a flat mapping from the path of a part ("model.body.0.weight", "apgd-ce.restarts") to
text that is equal for equal parts. It is made of types, attributes, parameters, buffers and hooks,
numbers to the last digit and tensors by a hash of their bytes. It leaves out what does not change
the answer: the device, DistributedDataParallel and compiled wrappers, the training mode,
`requires_grad`, and settings that only decide how fast an attack runs. Classes of pyadv and torch
go by their public names, so that moving a module between files does not change an identity.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# torch's stub leaves the name out.
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils.hooks import RemovableHandle

from pyadv.engine.attack import Attack

_OURS = ("pyadv", "torch")
_LONG = 96  # texts of more characters are hashed
_DEEP = 8  # nested attributes are read to this depth
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of every module, of which those that matter are read by name, and marks that
# torch.compile leaves.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_torch_compile"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# A logger leads to every other one, and a handle is numbered by a counter of the process.
_OF_THE_PROCESS = (logging.Logger, RemovableHandle)
_NOT_SETTINGS = frozenset({"model", "graphs", "_arguments"})  # attributes of our attacks
_ONLY_SPEED = frozenset({"compact", "validate"})  # settings of our attacks


class Unnamed(ValueError):
    """Raised for a callable that cannot be told from another one."""

    def __init__(self, where: str, what: str):
        super().__init__(
            f"state needs state_name=: {where} is {what}, which cannot be told from another "
            'callable later. Give state_name="..." a name of your own that changes when the '
            "callable does, or use a function or class defined at the top level of a module"
        )


def identity(parts: Mapping[str, Any], name: str | None = None) -> dict[str, str]:
    """Return the identity of `parts` (models, attacks, plain values), by path.

    Args:
        parts: the first component of the path -> the part.
        name: the user's name for callables without an identity; None if there is none.

    Raises:
        Unnamed: for a lambda, a local function and the like, without `name`.
    """
    reader = _Reader(name)
    for path, part in parts.items():
        reader.add(path, part)
    return reader.found if name is None else reader.found | {"state_name": repr(name)}


class _Reader:
    """Collects the entries of one identity in `found`."""

    def __init__(self, name: str | None):
        self.name = name
        self.found: dict[str, str] = {}
        self.where = ""
        self.inside = 0  # objects of classes that are neither modules nor attacks
        self.paths: dict[int, str] = {}  # path of each module that was read, by id
        self.texts: dict[int, tuple[Any, str]] = {}  # each object, kept alive, and its text

    def add(self, path: str, value: Any) -> None:
        """Enter `value`, and modules, attacks and dataclasses part by part."""
        self.where = path
        if isinstance(value, nn.Module):
            self._add_module(path, value)
        elif isinstance(value, Attack):
            self._add_parts(path, value, {**vars(value), "seed": _seed(value.seed)}, _NOT_SETTINGS)
        elif hasattr(value, "run") and hasattr(value, "describe"):  # an attack of the user's own
            self._add_parts(path, value, _attributes(value), {"model"})
        elif is_dataclass(value) and not isinstance(value, type):
            self._add_parts(path, value, _attributes(value), _ONLY_SPEED)
        else:
            text = self._text(value, 0)
            self.found[path] = text if len(text) <= _LONG else f"{text[:24]}... {_digest([text])}"

    def _add_parts(
        self, path: str, value: Any, parts: Mapping[str, Any], skipped: Iterable[str]
    ) -> None:
        self.found[path] = _type_name(type(value))
        for name, part in parts.items():
            if name not in skipped:
                self.add(f"{path}.{name}", part)

    def _add_module(self, path: str, module: nn.Module) -> None:
        module = _unwrapped(module)
        if id(module) in self.paths:
            self.found[path] = f"the module {self.paths[id(module)]}"
            return
        self.paths[id(module)] = path
        children = {k: m for k, m in module._modules.items() if m is not None}
        # The order of its children is the order in which nn.Sequential calls them.
        self.found[path] = f"{_type_name(type(module))}({', '.join(children)})"
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        for name, tensor in own.items():
            self.add(f"{path}.{name}", tensor)
        for name, child in children.items():
            self.add(f"{path}.{name}", child)
        if isinstance(module, torch.jit.ScriptModule):
            self.found[f"{path}.code"] = _digest(
                [module.code if hasattr(module, "forward") else ""]
            )
            return
        if isinstance(module, torch.fx.GraphModule):
            self.found[f"{path}.code"] = _digest([module.code])
            return
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                self.add(f"{path}.{name}", value)
        for kind in _HOOKS:
            for i, hook in enumerate(vars(module)[kind].values()):
                self.add(f"{path}.{kind}[{i}]", hook)

    def _text(self, value: Any, depth: int) -> str:
        if value is None or isinstance(value, (bool, int, float, complex, bytes)):
            return repr(value)
        if isinstance(value, str):
            return "a device" if _DEVICE.fullmatch(value) else repr(value)
        if isinstance(value, Tensor):
            return _tensor_text(value)
        if isinstance(value, np.ndarray):
            return f"array {value.shape} {value.dtype} {_digest([value.tobytes()])}"
        if isinstance(value, np.generic):
            return repr(value.item())
        if isinstance(value, torch.device):
            return "a device"
        if isinstance(value, type):
            return _type_name(value)
        if isinstance(value, ModuleType):
            return value.__name__
        if depth > _DEEP:
            return _type_name(type(value))
        if id(value) in self.texts:
            return self.texts[id(value)][1]
        self.texts[id(value)] = value, "..."  # what it contains may lead back to it
        text = self._compound(value, depth + 1)
        self.texts[id(value)] = value, text
        return text

    def _compound(self, value: Any, depth: int) -> str:
        if isinstance(value, nn.Module):
            part = copy(self)  # with the same modules and objects read so far
            part.found = {}
            part.add(self.where, value)
            return f"{_type_name(type(value))} {_digest(map(str, sorted(part.found.items())))}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self._text(v, depth) for v in value)})"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(self._text(v, depth) for v in value))}}}"
        if isinstance(value, Mapping):
            items = (f"{self._text(k, depth)}: {self._text(v, depth)}" for k, v in value.items())
            return f"{{{', '.join(sorted(items))}}}"
        if isinstance(value, enum.Enum):
            return f"{_type_name(type(value))}.{value.name}"
        if isinstance(value, partial):
            return f"partial{self._text((value.func, value.args, value.keywords), depth)}"
        if isinstance(value, MethodType):
            owner = self._text(value.__self__, depth)
            return f"{owner}.{value.__func__.__name__}"
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(value)
        if callable(value):
            return self._callable(value, depth)
        return self._object(value, depth)

    def _callable(self, value: Callable[..., Any], depth: int) -> str:
        original = getattr(value, "_torchdynamo_orig_callable", None)  # by torch.compile
        if original is not None:
            return self._text(original, depth)
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            inside = "" if owner is None else f"{self._text(owner, depth)}."
            return inside + value.__qualname__
        name = getattr(value, "__qualname__", None)
        if name is not None:
            module = getattr(value, "__module__", None) or ""
            if _found(module, name) is not value:
                return self._named(_what(name))
            text = _public(module, name)
            plain = isinstance(value, FunctionType)
            code = value if plain else getattr(value, "__wrapped__", None)
            if module.split(".")[0] not in _OURS and isinstance(code, FunctionType):
                text += f" {self._code(code, depth)}"
            return text
        if "<locals>" in type(value).__qualname__:
            return self._named(f"an instance of the local class {type(value).__name__}")
        return self._object(value, depth)

    def _named(self, what: str) -> str:
        """Return the text of a callable without an identity, which needs a name from the user.

        Inside other objects, such as a configuration, it stands for itself: nobody could be asked
        to name what a library keeps there.
        """
        if self.inside:
            return what
        if self.name is None:
            raise Unnamed(self.where, what)
        return "named by state_name"

    def _code(self, function: FunctionType, depth: int) -> str:
        """Return a hash of what the function computes: its body and what it closes over."""
        if depth > _DEEP:
            return function.__qualname__
        words = list(_code_words(function.__code__))
        words.append(self._text((function.__defaults__, function.__kwdefaults__), depth))
        for cell in function.__closure__ or ():
            inside = cell.cell_contents
            local = isinstance(inside, FunctionType) and inside is not function
            words.append(self._code(inside, depth + 1) if local else self._text(inside, depth))
        return _digest(words)

    def _object(self, value: Any, depth: int) -> str:
        kind, attributes = _type_name(type(value)), _attributes(value)
        if isinstance(value, _OF_THE_PROCESS):
            return kind
        if attributes:
            self.inside += 1
            text = f"{kind}{self._text(attributes, depth)}"
            self.inside -= 1
            return text
        shown = repr(value)
        return kind if " at 0x" in shown else f"{kind} {shown}"


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside compiled and data-parallel wrappers."""
    while True:
        wrapped = isinstance(module, _WRAPPERS)
        children = dict(module._modules.items())  # TorchScript's mapping has no get
        inside = children.get("module" if wrapped else "_orig_mod")
        if inside is None:
            return module
        module = inside


def _seed(seed: int | None) -> int:
    """Return the seed that an attack uses for its keyed noise."""
    return torch.initial_seed() if seed is None else seed


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object; of a dataclass those that it is compared by."""
    if is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
    names = [n for kind in type(value).__mro__ for n in vars(kind).get("__slots__", ())]
    slots = {n: getattr(value, n) for n in names if hasattr(value, n) and n != "__dict__"}
    return slots | getattr(value, "__dict__", {})


def _type_name(kind: type) -> str:
    return _public(kind.__module__, kind.__qualname__)


def _public(module: str, name: str) -> str:
    """Return the name of a class or function; of torch's and our own without the file it is in."""
    first = module.split(".")[0]
    return f"{first if first in _OURS else module}.{name}"


def _found(module: str, name: str) -> Any:
    """Return what the module has under this name, None for nothing."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _what(name: str) -> str:
    if "<lambda>" in name:
        return "a lambda"
    return f"the local function {name}" if "<locals>" in name else f"the function {name}"


def _tensor_text(t: Tensor) -> str:
    if isinstance(t, UninitializedTensorMixin):
        return "not initialised"
    kind = f"tensor {list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
    try:
        flat = t.detach().cpu()
        flat = flat.to_dense() if flat.layout != torch.strided else flat
        flat = flat.dequantize() if flat.is_quantized else flat
        flat = flat.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return f"{kind} {_digest([flat.view(torch.uint8).numpy().data])}"
    except (NotImplementedError, RuntimeError):  # on "meta", or a subclass without its own storage
        return kind


def _code_words(code: CodeType) -> Iterable[str | bytes]:
    yield code.co_code
    yield " ".join(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_words(constant)
        elif isinstance(constant, frozenset):  # its order changes from process to process
            yield str(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _digest(words: Iterable[str | bytes | memoryview]) -> str:
    found = hashlib.blake2b(digest_size=12)
    for word in words:
        data = word.encode("utf-8", "backslashreplace") if isinstance(word, str) else word
        found.update(data)
        found.update(b"\0")
    return f"#{found.hexdigest()}"
