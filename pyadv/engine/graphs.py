"""Recordings of searches as CUDA graphs, and the conditions under which a recording is replayed.

A replay launches the kernels of all steps at once. They read and write the memory they were
recorded with. So everything that may differ from call to call (images, labels, radii, the key of
the noise) is in tensors that stay in place and are filled before each replay. Everything else that
a search reads (settings, modes, the model's attributes and the addresses of its parameters) is
compared first; if it differs, the steps are recorded again. Weights that an optimiser changes in
place need no new recording.

The first attack of a kind runs eagerly, which also does the initialisation that a recording must
not contain. The second runs eagerly as well and is watched for actions that a replay would not
repeat: waiting for the device, drawing random numbers on the host, changing the model's attributes.
If there were none, the third is recorded; the third and all later ones are replays.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyadv.engine.results import Perturbed
from pyadv.engine.task import Task, memory
from pyadv.menus import Auto
from pyadv.passes import record
from pyadv.passes.borrow import footprint, has_hooks, host_generators, same_footprint, tensors
from pyadv.passes.record import Recorder
from pyadv.passes.view import FastView
from pyadv.tensors import compute_dtype

_KEPT = 8  # kinds of calls that an attack remembers for each model, the last used ones
_MOST_PASSES = 200  # forward passes of the longest graph that "auto" records
_RADII = ("eps", "alpha")  # numbers that schedules change
# Settings that have been used before the steps begin.
_OUTSIDE = ("start", "start_from", "compact", "validate", "speed")
_CHANGES = "the model changes its own attributes as it runs"
_LOG = logging.getLogger("pyadv")

Search = Callable[[Task], Perturbed]


def _varying(task: Task) -> dict[str, Tensor | float]:
    """Return what may differ between calls that share a recording."""
    s = task.settings
    given: dict[str, Tensor | float | None]
    given = {"x": task.x, "first": task.first, "y": task.y}
    given |= {"target": task.target, "group": task.group}
    if s.rule.draws_noise:
        given |= {"ids": task.noise.ids, "key": task.noise.key}
    given |= {k: v for k, v in s.parameters.items() if k in _RADII or isinstance(v, Tensor)}
    return {k: v for k, v in given.items() if v is not None}


def _reading(task: Task, held: dict[str, Tensor]) -> Task:
    """Return the task with the tensors `held` in place of what varies."""
    mine: dict[str, Any] = {k: held[k] for k in vars(task) if k in held}
    noise = {k: held[k] for k in vars(task.noise) if k in held}
    settings = {k: held[k] for k in task.settings.parameters if k in held}
    return replace(
        task,
        noise=replace(task.noise, **noise),
        settings=replace(task.settings, **settings),
        **mine,
    )


def _signature(task: Task) -> tuple[Any, ...]:
    """Return what a recording is made for, apart from the model."""
    s, varying = task.settings, _varying(task)
    read = [f.name for f in fields(s) if f.name not in (*varying, *_OUTSIDE)]
    settings = [getattr(s, name) for name in read]
    return {k: _form(v) for k, v in varying.items()}, settings, record.arithmetic(task.x.device)


def _form(value: Tensor | float) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value.shape, value.stride(), value.dtype, value.device
    return "a number"


def _hold(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """Return a tensor that stays in place and can hold values like `value`."""
    if isinstance(value, Tensor) and value.dim():
        return torch.empty_like(value)
    dtype = torch.int64 if name == "key" else compute_dtype(x.dtype)
    return torch.empty((), dtype=dtype, device=x.device)


def _fill(place: Tensor, value: Tensor | float) -> None:
    """Write `value` without waiting for the device: numbers travel as arguments of a kernel."""
    if isinstance(value, Tensor) and (value.dim() or value.is_cuda):
        place.copy_(value)
    else:
        place.fill_(float(value) if place.is_floating_point() else int(value))


@dataclass(frozen=True)
class _Kind:
    """The conditions of a recording: the signature of the task, and all that a forward pass may
    read from the model."""

    signature: tuple[Any, ...]
    seen: list[Any]
    places: list[int]

    @classmethod
    def of(cls, module: nn.Module, task: Task) -> _Kind:
        return cls(_signature(task), footprint(module), [t.data_ptr() for t in tensors(module)])

    def serves(self, now: _Kind) -> bool:
        same = self.places == now.places and same_footprint(self.seen, now.seen)
        return same and self.signature == now.signature


@dataclass(eq=False)
class _Recording:
    """The recording of one kind of task. `replay` is None until the steps are recorded; `why` is
    the reason if they never will be."""

    kind: _Kind
    watched: bool = False
    replay: Callable[[], None] = memory()
    held: dict[str, Tensor] = memory()
    result: Perturbed = memory()
    why: str | None = None

    def record(self, recorder: Recorder, search: Search, task: Task) -> None:
        held = {k: _hold(k, v, task.x) for k, v in _varying(task).items()}
        for k, v in _varying(task).items():
            _fill(held[k], v)
        fixed = _reading(task, held)

        def work() -> Perturbed:  # on a copy of the first iterate, which the steps move
            return search(replace(fixed, first=fixed.first.clone()))

        self.replay, self.result = recorder.record(work)
        self.held = held

    def __call__(self, recorder: Recorder, task: Task) -> Perturbed:
        with recorder.turn():
            for k, v in _varying(task).items():
                _fill(self.held[k], v)
            self.replay()
            return Perturbed(**{k: v.clone() for k, v in vars(self.result).items()})


class Graphs:
    """The recordings of one attack, for each model; they are freed with the attack or the model.

    `mode` is "auto", True (which raises an error if nothing can be recorded) or False. `recorded`
    and `replayed` are counts; `why` says why the last call was neither. A copy, also by pickle,
    starts without recordings.
    """

    def __init__(self, mode: Auto = "auto"):
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

    def run(self, search: Search, task: Task, compacts: bool) -> Perturbed:
        """Return `search(task)`, replayed if it has been recorded. With `compacts` the search may
        change the size of the batch."""
        if self.mode is False or torch.compiler.is_compiling():
            return search(task)
        module = task.model.module if isinstance(task.model, FastView) else task.model
        why = _obstacle(module, task, compacts, self.mode is True)
        if why is not None or not isinstance(module, nn.Module):
            if self.mode is True:
                raise ValueError(f"graph=True: {why}")
            self.why = why
            return search(task)
        with record.lock:
            recording, new = self._find(module, task)
            if not new and recording.why is None:
                recorder = record.recorder(task.x.device)
                if not recording.watched:
                    return self._watched(recording, recorder, search, module, task)
                if recording.replay is None:
                    self._record(recording, recorder, search, task)
                if recording.replay is not None:
                    self.replayed += 1
                    self.why = None
                    return recording(recorder, task)
        if recording.why is not None and self.mode is True:
            raise RuntimeError(f"graph=True: {recording.why}")
        self.why = recording.why or "it is the first of its kind"
        result = search(task)
        if new and not recording.kind.serves(_Kind.of(module, task)):
            if module in self._restless:  # a single change may be lazy initialisation
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

    def _find(self, module: nn.Module, task: Task) -> tuple[_Recording, bool]:
        """Return the recording for tasks like this one, and whether this is the first."""
        known, kind = self._of.setdefault(module, []), _Kind.of(module, task)
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
        task: Task,
    ) -> Perturbed:
        recording.watched, drawn = True, host_generators()
        self.why = "it was watched, to be recorded when it comes again"
        result, waited = recorder.watch(lambda: search(task))
        if waited:
            self._give_up(recording, "the model or the loss waits for the device")
        elif drawn != host_generators():
            self._give_up(recording, "the model draws random numbers on the host")
        elif not recording.kind.serves(_Kind.of(module, task)):
            self._give_up(recording, _CHANGES)
        return result

    def _record(
        self, recording: _Recording, recorder: Recorder, search: Search, task: Task
    ) -> None:
        try:
            recording.record(recorder, search, task)
            self.recorded += 1
        except Exception as error:  # CUDA or the user's code may raise anything
            first = error.__context__ or error
            self._give_up(recording, f"{type(first).__name__}: {first}".splitlines()[0], error)


def _obstacle(module: Any, task: Task, compacts: bool, wanted: bool) -> str | None:
    """Return why this search cannot be recorded or is not worth it, or None."""
    s, device = task.settings, task.x.device
    if device.type not in record.RECORDERS:
        return f"graphs are for CUDA, and x is on {device}"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being recorded already"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    if compacts:
        return "released samples leave the batch (compact)"
    if s.checks_values(task.x):
        return "validate=True reads values"
    if not isinstance(module, nn.Module):
        return "the model is not a torch.nn.Module"
    if has_hooks(module):
        return "the model has hooks"
    if not task.x.numel() or not s.steps:
        return "there is nothing to do"
    if any(t.device != device for t in tensors(module)):
        return f"the model is not on {device} as x is"
    if wanted:
        return None
    if callable(s.loss.loss):
        return "what a callable reads cannot be compared; graph=True vouches for it"
    if s.steps * s.eot > _MOST_PASSES:
        return f"it has more than {_MOST_PASSES} passes"
    return None
