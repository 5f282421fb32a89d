"""The processes that evaluate one model together, and what they tell each other.

All processes have all samples. Each works on its part of them, and at every exchange each one
learns what all have found. An exchange also carries errors, so that no process waits for one that
has failed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyadv.attacks.identity import identity
from pyadv.attacks.progress import Lines, Progress
from pyadv.passes.borrow import is_sharded, unwrap

T = TypeVar("T")
_S = TypeVar("_S", bound="_Sliceable")

_MEETING = timedelta(minutes=30)  # for all processes to call the evaluation
_PATIENCE = timedelta(days=7)  # within it: one process may have far more work than another
_SHOWN = 3  # differences in an error message
_HINT = "; group=False evaluates in this process alone"


class _Sliceable(Protocol):
    def __getitem__(self: _S, part: slice, /) -> _S: ...


class ProcessFailed(RuntimeError):
    """Raised in the processes of an evaluation in which another process has failed."""


class Processes:
    """The processes of an evaluation, and the place of this one among them.

    Attributes:
        rank: the number of this process, from 0.
        count: how many processes there are.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None):
        self.rank, self.count = rank, count
        self._group = group
        self._over = False  # after a failure nobody listens any more

    @property
    def alone(self) -> bool:
        return self.count == 1

    def part(self, items: _S) -> _S:
        """Return the items (of a tensor or sequence) that this process works on. Neighbours go to
        different processes, because hard samples often lie together."""
        return items if self.alone else items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank.

        Raises:
            ProcessFailed: if another process has failed or has gone.
        """
        return [value] if self.alone else self._exchange(None, value)

    def first(self, value: T) -> T:
        """Return the value of process 0. The values of the others are not sent."""
        if self.alone:
            return value
        values: list[Any] = [value if self.rank == 0 else None]
        with _uninterrupted():  # an interruption between the two exchanges would part the processes
            self.gather(None)  # a failure would not fit into the broadcast
            with self._transport():
                dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def finish(self) -> None:
        """Wait until all processes have succeeded. Afterwards nobody listens any more."""
        with _uninterrupted():
            self.gather(None)
            self._over = True

    def each(self, found: Iterable[T]) -> Iterator[T]:
        """Yield what all processes have found: this one's at once if it is alone, otherwise
        everybody's, by rank, when all have ended."""
        if self.alone:
            yield from found
        else:
            for part in self.gather(list(found)):
                yield from part

    def agree(self, what: str, words: Mapping[str, str]) -> None:
        """Raise ValueError, in all processes, unless all have the same words for everything."""
        for rank, theirs in enumerate(every := self.gather(dict(words))):
            ours = every[0]
            names = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if not names:
                continue
            self._over = True  # all processes raise here
            shown = "; ".join(
                f"{k}: {ours.get(k, 'none')} in process 0, {theirs.get(k, 'none')} in process "
                f"{rank}"
                for k in names[:_SHOWN]
            )
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                f"{what} must be the same in all {self.count} processes, got {shown}{more}{_HINT}"
            )

    def compare(self, what: str, parts: Mapping[str, Any]) -> None:
        """Raise ValueError, in all processes, unless the parts (attacks, tensors, plain values) are
        the same in all."""
        if not self.alone:
            self.agree(what, identity(parts, "any"))

    def progress(
        self, progress: Progress | Literal["auto"] | None, samples: int | None = None
    ) -> Progress | None:
        """Return what to call for "auto", None or a callable: process 0 alone prints."""
        if progress == "auto":
            return Lines(samples=samples) if self.rank == 0 else None
        return progress

    def tell(self, error: BaseException) -> None:
        """Let the others know that this process fails, unless they know."""
        if self.alone or self._over:
            return
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        with contextlib.suppress(ProcessFailed):
            self._exchange(text, None)

    def _exchange(self, failure: str | None, value: Any) -> list[Any]:
        answers: list[Any] = [None] * self.count
        with self._transport():
            dist.all_gather_object(answers, (failure, value), group=self._group)
        failed = [f"process {i} ({text})" for i, (text, _) in enumerate(answers) if text]
        if failed:
            self._over = True
            raise ProcessFailed(
                f"the evaluation stopped because it failed in {', '.join(failed)} of "
                f"{self.count} processes"
            )
        return [value for _, value in answers]

    @contextlib.contextmanager
    def _transport(self) -> Iterator[None]:
        """Turn errors of the connection into one that says what happened."""
        try:
            with _uninterrupted():
                yield
        except RuntimeError as error:
            self._over = True
            raise ProcessFailed(
                f"process {self.rank} of {self.count} lost the connection to another process of "
                f"the evaluation, which has probably ended: {error}"
            ) from error


ALONE = Processes()


@contextlib.contextmanager
def together(
    model: Callable[..., Any], group: Any = None, others: Sequence[Callable[..., Any]] = ()
) -> Iterator[Processes]:
    """Enter an evaluation of `model` by several processes, which all must enter it.

    An error in one process raises `ProcessFailed` in the others. For the time of the context the
    buffers of the model are those of process 0: running statistics differ between the processes of
    data-parallel training.

    Args:
        model: the model; a parameter that differs between the processes is refused.
        group: the process group; None for the default group of torch.distributed if it is
            initialised, unless FSDP shards the model, whose passes all processes must make
            together; False for this process alone; or `Processes`, to share those of a context
            around this one.
        others: other models that take part.

    Raises:
        ProcessFailed: if another process has failed or has gone.
        ValueError: if the models of the processes differ, or FSDP shards one and a group is given.
    """
    if isinstance(group, Processes):
        yield group
        return
    models = [m for m in (model, *others) if isinstance(m, nn.Module)]
    if not _several(group, models):
        yield ALONE
        return
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_process_group_ranks(group)
    # Tables and texts travel over the CPU, whatever connects the cards, and may have to wait longer
    # than a collective of the training.
    world = len(ranks) == dist.get_world_size()
    local: dict[str, Any] = {} if world else {"use_local_synchronization": True}
    try:
        ours = dist.new_group(ranks, timeout=_MEETING, backend="gloo", **local)
        dist.distributed_c10d._set_pg_timeout(_PATIENCE, ours)
    except RuntimeError as error:
        raise ProcessFailed(
            f"the {len(ranks)} processes of the group did not meet, though every one must call the "
            f"evaluation{_HINT}: {error}"
        ) from error
    processes = Processes(dist.get_rank(ours), len(ranks), ours)
    try:
        with contextlib.ExitStack() as stack:
            for module in map(unwrap, models):
                if isinstance(module, nn.Module):  # as all of them are
                    stack.enter_context(_as_in_first(module, processes))
            yield processes
        processes.finish()
    except BaseException as error:
        processes.tell(error)
        raise
    finally:
        dist.destroy_process_group(ours)


def _several(group: Any, models: Sequence[nn.Module]) -> bool:
    """Return whether several processes are to work together."""
    if group is False or not (dist.is_available() and dist.is_initialized()):
        return False
    if dist.get_world_size(group) == 1:
        return False
    if any(map(is_sharded, models)):
        if group is None:
            return False
        raise ValueError(
            "group must be None or False for a model that FSDP shards: every process must make "
            "every pass of it, so each evaluates all samples"
        )
    return True


@contextlib.contextmanager
def _as_in_first(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Give the model the buffers of process 0 inside the context."""
    processes.compare("the parameters of the model", dict(model.named_parameters()))
    buffers = dict(model.named_buffers())
    texts = processes.gather(identity(buffers, "any"))
    if all(text == texts[0] for text in texts):
        yield
        return
    shapes = {name: list(buffer.shape) for name, buffer in buffers.items()}
    processes.compare("the shapes of the model's buffers", shapes)
    saved = [b.clone() for b in buffers.values()]
    theirs: list[Tensor] = processes.first([b.detach().cpu() for b in buffers.values()])
    try:
        _copy(buffers.values(), theirs)
        yield
    finally:
        _copy(buffers.values(), saved)


def _copy(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Deliver an interruption from the keyboard at the end of the context. In the middle of an
    exchange it would leave the processes at different places."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, the system's default, or not Python's
        yield
        return
    signal.signal(signal.SIGINT, lambda *now: came.append(now))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[-1])
