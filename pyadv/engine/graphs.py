"""The steps of an attack as a CUDA graph: recorded once, replayed for every batch like it.

A replay launches the kernels of all steps at once, which read and write the memory they were
recorded with. So whatever may differ from call to call (images, labels, radii, the key of noise)
lies in tensors that stay in place and are filled before each replay. All else that a search reads
(settings, modes, the model's attributes and the places of its parameters) is compared first, and
where it differs the steps are recorded anew. Weights that an optimiser changes in place are read
where they are.

The first attack of a kind runs as it is, which also warms up what may not happen in a recording.
The second does too, and is watched: waiting for the device, drawing random numbers on the host and
changing the model's attributes are what a replay would not do. If it did nothing of that, the third
is recorded, and it and all later ones are replays.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyadv.engine.results import Perturbed
from pyadv.passes.borrow import footprint, has_hooks, same_footprint, tensors
from pyadv.passes.view import FastView
from pyadv.tensors import compute_dtype

if TYPE_CHECKING:
    from pyadv.engine.starts import Noise
    from pyadv.engine.state import Settings

GRAPHS = ("auto", True, False)

_KEPT = 8  # kinds of calls that an attack remembers for each model; the last used stay
_MOST_PASSES = 200  # forward passes of a graph that "auto" records
_RADII = ("eps", "alpha")  # numbers that schedules change
_OUTSIDE = ("start", "start_from", "compact", "validate", "speed")  # settled before the steps
_CHANGES = "the model changes its own attributes as it runs"
_LOG = logging.getLogger("pyadv")
_lock = threading.RLock()  # recordings share memory: one at a time is made or replayed


@dataclass(frozen=True)
class Call:
    """What one search is given: `first` is the iterate it begins with."""

    x: Tensor
    first: Tensor
    y: Tensor
    settings: Settings
    noise: Noise
    target: Tensor | None
    group: Tensor | None

    def live(self) -> dict[str, Tensor | float]:
        """What may differ between calls that share a recording."""
        s = self.settings
        given = {"x": self.x, "first": self.first, "y": self.y}
        given |= {"target": self.target, "group": self.group}
        if s.omega:
            given |= {"ids": self.noise.ids, "key": self.noise.key}
        given |= {k: v for k, v in s.parameters.items() if k in _RADII or isinstance(v, Tensor)}
        return {k: v for k, v in given.items() if v is not None}

    def reading(self, held: dict[str, Tensor]) -> Call:
        """The same, with `held` in the place of what is live."""
        of = {k: held[k] for k in vars(self) if k in held}
        noise = {k: held[k] for k in vars(self.noise) if k in held}
        parameters = {k: held[k] for k in self.settings.parameters if k in held}
        settings = replace(self.settings, **parameters)
        return replace(self, noise=replace(self.noise, **noise), settings=settings, **of)

    def kind(self) -> tuple[Any, ...]:
        """What a recording is made for, apart from the model."""
        s, live = self.settings, self.live()
        read = [f.name for f in fields(s) if f.compare and f.name not in (*live, *_OUTSIDE)]
        settings = [getattr(s, name) for name in read]
        return {k: _form(v) for k, v in live.items()}, settings, _arithmetic(self.x.device)


def _form(value: Tensor | float) -> Any:
    if _is_number(value):
        return "a number"
    return value.shape, value.stride(), value.dtype, value.device


def _is_number(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) or not value.dim()


def _arithmetic(device: torch.device) -> tuple[Any, ...]:
    """What decides on the kernels that PyTorch chooses."""
    kind, cudnn = device.type, torch.backends.cudnn
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision),
        torch.backends.cuda.matmul.fp32_precision,
    )


def _hold(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A place for `value` that stays."""
    if _is_number(value):
        dtype = torch.int64 if name == "key" else compute_dtype(x.dtype)
        return torch.empty((), dtype=dtype, device=x.device)
    return torch.empty_like(value)


def _fill(place: Tensor, value: Tensor | float) -> None:
    """Without waiting for the device: numbers travel as arguments of a kernel."""
    if _is_number(value) and not (isinstance(value, Tensor) and value.is_cuda):
        place.fill_(float(value) if place.is_floating_point() else int(value))
    else:
        place.copy_(value)


Search = Callable[[Any, Call], Perturbed]


class Recorder(Protocol):
    """Records and replays on one device."""

    def watch(self, work: Callable[[], Perturbed]) -> tuple[Perturbed, bool]:
        """What `work` gives, and whether the host waited for the device meanwhile."""

    def record(self, work: Callable[[], Perturbed]) -> tuple[Callable[[], None], Perturbed]:
        """How to do `work` again, and the tensors in which its result then lies."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """After all replays so far, whatever stream they ran in, and before all later ones."""


class CudaRecorder:
    """By CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # on which nothing runs: it only records
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._free = torch.cuda.Event()

    def watch(self, work: Callable[[], Perturbed]) -> tuple[Perturbed, bool]:
        if torch.cuda.get_sync_debug_mode():  # the caller watches, and hears of it
            return work(), False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for w in caught:
            if w not in waits:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return result, bool(waits)

    def record(self, work: Callable[[], Perturbed]) -> tuple[Callable[[], None], Perturbed]:
        graph, shared = torch.cuda.CUDAGraph(), next(iter(self._graphs), None)
        pool = torch.cuda.graph_pool_handle() if shared is None else shared.pool()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # a recording cannot take back what the allocator holds unused
        generator = torch.cuda.default_generators[self._device.index]
        before = generator.get_state()
        ended = False
        # Casts of weights that autocast remembers are of the weights as they were, or would lie in
        # the graph's memory; the first step of each replay has to make them.
        torch.clear_autocast_cache()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool, capture_error_mode="thread_local")  # others may go on
                try:
                    result = work()
                finally:
                    graph.capture_end()
                    ended = True
        finally:
            torch.clear_autocast_cache()
            if not ended:
                self._recover(graph, pool, before)
        self._graphs.add(graph)
        return graph.replay, result

    def _recover(self, graph: torch.cuda.CUDAGraph, pool: Any, state: Tensor) -> None:
        """After CUDA refused to go on, PyTorch leaves its allocator and its generator as they are
        in the midst of a recording."""
        _failed.append(graph)  # the allocator may ask it again
        with contextlib.suppress(RuntimeError, AttributeError):  # none of it is public
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
            torch._C._cuda_releasePool(self._device.index, pool)
        fresh = torch.Generator(self._device)
        fresh.set_state(state)
        torch.cuda.default_generators[self._device.index].graphsafe_set_state(fresh)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        self._free.wait(stream)
        try:
            yield
        finally:
            self._free.record(stream)


_failed: list[torch.cuda.CUDAGraph] = []

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by device type
_recorders: dict[torch.device, Recorder] = {}


def _recorder(device: torch.device) -> Recorder:
    if device not in _recorders:
        _recorders[device] = RECORDERS[device.type](device)
    return _recorders[device]


@dataclass(frozen=True)
class _Kind:
    """What a recording is made for: the call, and what a forward pass may read off the model."""

    call: tuple[Any, ...]
    seen: list[Any]
    places: list[int]

    @classmethod
    def of(cls, module: nn.Module, call: Call) -> _Kind:
        return cls(call.kind(), footprint(module), [t.data_ptr() for t in tensors(module)])

    def serves(self, now: _Kind) -> bool:
        same = self.places == now.places and same_footprint(self.seen, now.seen)
        return same and self.call == now.call


@dataclass(eq=False)
class _Recording:
    """What one kind of call came to; `replay` is None until its steps are recorded, and `why` says
    why they will not be."""

    kind: _Kind
    watched: bool = False
    replay: Callable[[], None] | None = None
    held: dict[str, Tensor] | None = None
    result: Perturbed | None = None
    why: str | None = None

    def record(self, recorder: Recorder, search: Search, model: Any, call: Call) -> None:
        held = {k: _hold(k, v, call.x) for k, v in call.live().items()}
        for k, v in call.live().items():
            _fill(held[k], v)
        still = call.reading(held)

        def work() -> Perturbed:  # on a copy of the first iterate, which the steps move
            return search(model, replace(still, first=still.first.clone()))

        self.replay, self.result = recorder.record(work)
        self.held = held

    def __call__(self, recorder: Recorder, call: Call) -> Perturbed:
        with recorder.turn():
            for k, v in call.live().items():
                _fill(self.held[k], v)
            self.replay()
            return Perturbed(**{k: v.clone() for k, v in vars(self.result).items()})


class Graphs:
    """The recordings of one attack, for each model; they end with the attack or the model.

    `mode` is "auto", True (which raises where nothing can be recorded) or False. `recorded` and
    `replayed` count, `why` says why the last call was neither. A copy, also by pickle, starts
    without recordings.
    """

    def __init__(self, mode: bool | str = "auto"):
        self.mode = mode
        self.recorded = self.replayed = 0
        self.why: str | None = None
        self._told: set[str] = set()
        self._restless: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._of: weakref.WeakKeyDictionary[nn.Module, list[_Recording]]
        self._of = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        words = f"graph={self.mode!r}: {self.recorded} recorded, {self.replayed} replayed"
        return f"{words}; last call: {self.why}" if self.why else words

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.mode,)

    def run(self, search: Search, model: Any, call: Call, compacts: bool) -> Perturbed:
        """`search(model, call)`, replayed if it has been recorded. `compacts`: it may change the
        size of the batch."""
        if self.mode is False or torch.compiler.is_compiling():
            return search(model, call)
        module = model.module if isinstance(model, FastView) else model
        why = _obstacle(module, call, compacts, self.mode is True)
        if why is not None:
            if self.mode is True:
                raise ValueError(f"graph=True: {why}")
            self.why = why
            return search(model, call)
        with _lock:
            recording, new = self._find(module, call)
            if not new and recording.why is None:
                recorder = _recorder(call.x.device)
                if not recording.watched:
                    return self._watched(recording, recorder, search, module, model, call)
                if recording.replay is None:
                    self._record(recording, recorder, search, model, call)
                if recording.replay is not None:
                    self.replayed += 1
                    self.why = None
                    return recording(recorder, call)
        if recording.why is not None and self.mode is True:
            raise RuntimeError(f"graph=True: {recording.why}")
        self.why = recording.why or "it is the first of its kind"
        result = search(model, call)
        if new and not recording.kind.serves(_Kind.of(module, call)):
            if module in self._restless:  # once may be the first use of what is made when needed
                self._give_up(recording, _CHANGES)
            self._restless.add(module)
        return result

    def _give_up(self, recording: _Recording, why: str, error: BaseException | None = None) -> None:
        recording.why = self.why = why
        if self.mode is True:
            raise RuntimeError(f"graph=True: {why}") from error
        if why not in self._told:
            self._told.add(why)
            _LOG.info("an attack runs without a CUDA graph: %s", why)

    def _find(self, module: nn.Module, call: Call) -> tuple[_Recording, bool]:
        """What is known of calls like this one, and whether it is the first."""
        known, kind = self._of.setdefault(module, []), _Kind.of(module, call)
        found = next((r for r in known if r.kind.serves(kind)), None)
        recording = found or _Recording(kind)
        if found:
            known.remove(found)
        known.append(recording)
        del known[:-_KEPT]
        return recording, found is None

    def _watched(
        self,
        recording: _Recording,
        recorder: Recorder,
        search: Search,
        module: nn.Module,
        model: Any,
        call: Call,
    ) -> Perturbed:
        recording.watched, drawn = True, _host_generators()
        self.why = "it was watched, to be recorded when it comes again"
        result, waited = recorder.watch(lambda: search(model, call))
        if waited:
            self._give_up(recording, "the model or the loss waits for the device")
        elif drawn != _host_generators():
            self._give_up(recording, "the model draws random numbers on the host")
        elif not recording.kind.serves(_Kind.of(module, call)):
            self._give_up(recording, _CHANGES)
        return result

    def _record(
        self, recording: _Recording, recorder: Recorder, search: Search, model: Any, call: Call
    ) -> None:
        try:
            recording.record(recorder, search, model, call)
            self.recorded += 1
        except Exception as error:  # whatever CUDA, or the user's code within, has to say
            first = error.__context__ or error
            self._give_up(recording, f"{type(first).__name__}: {first}".splitlines()[0], error)


def _host_generators() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=False)["state"]
    own = {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), own


def _obstacle(module: Any, call: Call, compacts: bool, wanted: bool) -> str | None:
    """Why no graph can hold this search, or would be worth it; None if there is no reason."""
    s, device = call.settings, call.x.device
    if device.type not in RECORDERS:
        return f"graphs are for CUDA, and x is on {device}"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being recorded already"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    if compacts:
        return "released samples leave the batch (compact)"
    if s.checks_values(call.x):
        return "validate=True reads values"
    if not isinstance(module, nn.Module):
        return "the model is not a torch.nn.Module"
    if has_hooks(module):
        return "the model has hooks"
    if not call.x.numel() or not s.steps:
        return "there is nothing to do"
    if any(t.device != device for t in tensors(module)):
        return f"the model is not on {device} as x is"
    if wanted:
        return None
    if callable(s.loss.loss) or s.direction is not None:
        return "what a callable reads cannot be compared; graph=True vouches for it"
    if s.steps * s.eot > _MOST_PASSES:
        return f"it has more than {_MOST_PASSES} passes"
    return None
