"""A recorder of CUDA graphs. It knows nothing of attacks: it watches, records and replays work
that is a function without arguments."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

lock = threading.RLock()  # recordings share memory: one at a time is made or replayed


class Recorder(Protocol):
    """A recorder of one device."""

    def watch(self, work: Callable[[], T]) -> tuple[T, bool]:
        """Run `work`; return its result, and whether the host waited for the device meanwhile."""

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record `work`; return a function that does it again, and its result, whose tensors each
        replay writes."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Return a context whose work runs after all replays so far, whatever stream they ran in,
        and before all later ones."""


class CudaRecorder:
    """A recorder by CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # on which nothing runs: it only records
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._free = torch.cuda.Event()

    def watch(self, work: Callable[[], T]) -> tuple[T, bool]:
        if torch.cuda.get_sync_debug_mode():  # the caller watches already, and is told
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

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph, shared = torch.cuda.CUDAGraph(), next(iter(self._graphs), None)
        pool = torch.cuda.graph_pool_handle() if shared is None else shared.pool()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # a recording cannot take back what the allocator holds unused
        generator = torch.cuda.default_generators[self._device.index]
        before = generator.get_state()
        ended = False
        # Autocast caches casts of weights. A cached cast is of the weights as they were, and one
        # made now would lie in the graph's memory; the first step of each replay has to cast again.
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
        """Take PyTorch's allocator and generator out of the recording state, in which a recording
        that CUDA refused leaves them."""
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


def recorder(device: torch.device) -> Recorder:
    """Return the one recorder of `device`."""
    if device not in _recorders:
        _recorders[device] = RECORDERS[device.type](device)
    return _recorders[device]


def convolution_precision() -> str:
    """Return in which arithmetic cuDNN convolves float32: "ieee", "tf32" or "none"."""
    # PyTorch's stubs do not show that an object with this attribute replaces the module.
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision


def arithmetic(device: torch.device) -> tuple[Any, ...]:
    """Return the switches that decide which kernels PyTorch chooses on `device`."""
    kind, cudnn = device.type, torch.backends.cudnn
    return (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, convolution_precision()),
        torch.backends.cuda.matmul.fp32_precision,
    )
