"""Reading a network as a torch.fx graph, without side effects and without silent losses.

torch.fx runs the model's Python code on stand-ins for tensors. The code runs on a twin of the
model that shares its parameters and buffers, so that nothing the code writes ends up in the user's
model. What fx would drop in silence makes it refuse instead: backward passes written by the user,
switches of gradients or autocast within the forward pass, and random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import function as functions

from pyadv.passes.borrow import INTERNAL, contents, inside, is_atom, is_record

_MOST = 100_000  # objects that a model may hold in containers
_CONSTANT = "_tensor_constant"  # how fx names tensors that it finds in the code
# fx replaces nn.Module.__call__ while it traces, and must put back what it found: one at a time.
_lock = threading.RLock()


class Refused(Exception):
    """Says why a model cannot be read as a graph.

    `moved` names the attributes that its forward pass changes, as in `footprint`.
    """

    def __init__(self, why: str, moved: frozenset[tuple[int, str]] = frozenset()):
        super().__init__(why)
        self.moved = moved


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """Return the graph of the model and, for every target that it names, the layer or tensor.

    Other threads may call modules meanwhile, apart from compiled ones.

    Raises:
        Refused: if fx cannot follow the forward pass, or would not compute the same.
    """
    with _lock:
        twins = _Twins(model)
        tracer = _Tracer()
        try:
            twin = twins.of(model)
            before = _attributes(twin)
            graph = tracer.read(twin)
            moved = _moved(before, _attributes(twin))
            if moved:
                raise Refused("its forward pass changes its attributes", moved)
            return graph, _held(graph, model, twin, twins)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's classes, copied
            raise Refused(f"its attributes cannot be copied ({type(error).__name__})") from None
        finally:  # reference cycles within fx must not keep parameters alive
            tracer.release()
            twins.clear()


def _attributes(module: nn.Module) -> dict[tuple[int, str], list[Any]]:
    """Return what `footprint` returns, and version counters of tensors, by attribute."""
    found: dict[tuple[int, str], list[Any]] = {}
    for i, m in enumerate(module.modules()):
        for name, value in (*vars(m).items(), *m._parameters.items(), *m._buffers.items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                held = contents(value)
                versions = [
                    v._version for v in held if isinstance(v, Tensor) and not v.is_inference()
                ]
                found[i, name] = [*held, *versions]
    return found


def _moved(
    before: dict[tuple[int, str], list[Any]], now: dict[tuple[int, str], list[Any]]
) -> frozenset[tuple[int, str]]:
    def same(key: tuple[int, str]) -> bool:
        a, b = before.get(key), now.get(key)
        if a is None or b is None:
            return key[1].startswith(_CONSTANT)
        if len(a) != len(b):
            return False
        return all(
            v is w or (is_atom(v) and is_atom(w) and v == w) for v, w in zip(a, b, strict=True)
        )

    return frozenset(key for key in {*before, *now} if not same(key))


def _held(graph: fx.Graph, model: nn.Module, twin: nn.Module, twins: _Twins) -> dict[str, Any]:
    """Return the model's own layer or tensor for each target."""
    layers = dict(model.named_modules(remove_duplicate=False))
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            held[node.target] = layers[node.target]
            if _refers(held[node.target], model):
                raise Refused("a layer refers to the model, which a view would keep alive")
        elif node.op == "get_attr" and node.target not in held:
            value = twins.original(operator.attrgetter(node.target)(twin))
            free = isinstance(value, Tensor) and value.requires_grad
            if free and not any(value is p for p in model.parameters()):
                raise Refused("it computes with parameters that are not registered")
            held[node.target] = value
    return held


def _refers(layer: nn.Module, model: nn.Module) -> bool:
    """Return whether an attribute of the layer holds the model or one of its methods."""
    held = [v for m in layer.modules() for k, v in vars(m).items() if k not in INTERNAL]
    return any(getattr(v, "__self__", v) is model for a in held for v in (a, *contents(a)))


class _Tracer(fx.Tracer):
    """An fx tracer that leaves other threads alone and refuses what a graph cannot express."""

    proxy_buffer_attributes = True  # buffers are read when the graph runs, not when it is made

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.why: str | None = None

    def read(self, twin: nn.Module) -> fx.Graph:
        self.modes = _modes()
        try:
            with self._watching_functions():
                graph = self.trace(twin)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code, run on stand-ins for tensors
            why = self.why or f"torch.fx cannot follow it ({type(error).__name__}: {error})"
            raise Refused(why.splitlines()[0]) from None
        if self.why:  # the user's code has caught the error
            raise Refused(self.why)
        return graph

    def release(self) -> None:
        """Drop everything that refers to the model.

        A thread that entered one of fx's wrappers before fx removed it may leave it only now. So
        the attributes that wrappers read in other threads stay, and no more functions are wrapped.
        """
        self._autowrap_function_ids.clear()
        for name in vars(self).keys() - {"thread", "_autowrap_function_ids"}:
            delattr(self, name)

    def refuse(self, why: str) -> None:
        self.why = self.why or why
        raise Refused(why)

    @property
    def elsewhere(self) -> bool:
        """Whether the caller runs in another thread, whose modules are not being read."""
        return threading.get_ident() != self.thread

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.elsewhere:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.elsewhere:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # PyTorch also turns gradients off within autograd.Function
            self.refuse(
                "its forward pass switches gradients, autocast or checkpointing on or off, or "
                "calls an autograd.Function"
            )
        return super().create_node(*args, **kwargs)

    @contextlib.contextmanager
    def _watching_functions(self) -> Iterator[None]:
        """Refuse calls of autograd functions, of which fx would record the forward pass alone."""

        def watched(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                if not self.elsewhere:
                    name = getattr(args[0], "__qualname__", "an autograd.Function").split(".")[0]
                    self.refuse(f"it calls an autograd.Function ({name})")
                return original(*args, **kwargs)

            return call

        apply = vars(functions.Function)["apply"]
        # Which `apply` itself calls, also where the user has kept `apply` in a name of their own.
        inner = getattr(functions, "_is_setup_context_defined", None)
        with contextlib.ExitStack() as replaced:
            replaced.enter_context(
                _replaced(functions.Function, "apply", classmethod(watched(apply.__func__)))
            )
            if inner:
                replaced.enter_context(
                    _replaced(functions, "_is_setup_context_defined", watched(inner))
                )
            yield


@contextlib.contextmanager
def _replaced(owner: type | ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class or module, and put it back at the end."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _modes() -> tuple[Any, ...]:
    """Return the switches that decide what an operation does besides computing its result."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
    )


class _Twins:
    """Copies of a model's modules, containers and records; parameters and buffers are shared.

    Tensors that are neither are cloned. All else (arrays, functions, files) is shared.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._made: dict[int, tuple[Any, Any]] = {}  # by id of the original; it stays alive
        self._originals: dict[int, Any] = {}  # by id of a cloned tensor
        for m in model.modules():
            for t in (*m._parameters.values(), *m._buffers.values()):
                self._made[id(t)] = t, t

    def original(self, value: Any) -> Any:
        """Return the tensor that `value` was cloned from, or itself."""
        return self._originals.get(id(value), value)

    def clear(self) -> None:
        """Empty the copied modules, which cycles within fx may keep alive."""
        for value, twin in self._made.values():
            if isinstance(twin, nn.Module) and twin is not value:
                vars(twin).clear()
        self._made.clear()
        self._originals.clear()

    def of(self, value: Any) -> Any:
        """Return the twin of `value`."""
        if is_atom(value):
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if len(self._made) > _MOST:
            raise Refused(f"it holds more than {_MOST} objects")
        kind = type(value)
        if isinstance(value, nn.Module) or (kind is not SimpleNamespace and is_record(value)):
            twin = self._note(value, object.__new__(kind))
            vars(twin).update({k: self.of(v) for k, v in vars(value).items()})
            return twin
        if kind is SimpleNamespace:
            twin = self._note(value, SimpleNamespace())
            vars(twin).update({k: self.of(v) for k, v in vars(value).items()})
            return twin
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            twin = self._note(value, value.detach().clone().requires_grad_(value.requires_grad))
            self._originals[id(twin)] = value
            return twin
        if kind is MethodType:
            return self._note(value, MethodType(value.__func__, self.of(value.__self__)))
        if kind is functools.partial:
            args, kwargs = self.of(value.args), self.of(value.keywords)
            return self._note(value, functools.partial(self.of(value.func), *args, **kwargs))
        if isinstance(value, tuple):
            parts = [self.of(v) for v in value]
            return self._note(value, kind(*parts) if hasattr(kind, "_fields") else kind(parts))
        if isinstance(value, dict) and inside(value) is not None:
            empty = defaultdict(value.default_factory) if isinstance(value, defaultdict) else kind()
            twin = self._note(value, empty)
            twin.update({k: self.of(v) for k, v in value.items()})
            return twin
        if kind is set:
            return self._note(value, {self.of(v) for v in value})
        if inside(value) is not None:  # a list or deque
            twin = self._note(value, kind())
            twin.extend(self.of(v) for v in value)
            return twin
        return value

    def _note(self, value: Any, twin: Any) -> Any:
        self._made[id(value)] = value, twin
        return twin
