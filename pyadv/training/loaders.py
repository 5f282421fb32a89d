"""Training on the user's own loaders, in place of a data set of pyadv."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from pyadv.data import as_float
from pyadv.data.reading import IMAGE_KEYS, LABEL_KEYS
from pyadv.data.seeds import mixed, seeded


class Loader(Protocol):
    """A loader of batches, such as a DataLoader of a map-style data set."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Loaders:
    """The loaders of a run: iterables of batches with a length, usually DataLoaders.

    A batch is (x, y), (x, y, ids) or a dict with one of `IMAGE_KEYS` and one of `LABEL_KEYS` of
    `pyadv.data.reading`, such as pixel_values and labels, and with ids if there are any. x is
    (B, C, H, W), uint8 or floating in [0, 1]; y is (B,) int64. The ids number the samples of the
    training set and key the noise of attacks; without them the values of a sample do.

    Args:
        train: training batches.
        val: held-out batches, on which best.pt is chosen.
        test: batches of the final report, by default those of `val`.

    Raises:
        ValueError: if a loader has no length or its first batch has another form.
    """

    name = "own loader"

    def __init__(self, train: Loader, val: Loader | None, test: Loader | None) -> None:
        self.train, self.val, self.test = train, val, val if test is None else test
        for name in ("train", "val", "test"):
            loader = getattr(self, name)
            if loader is None:
                continue
            if not hasattr(loader, "__len__") or not hasattr(loader, "__iter__"):
                raise ValueError(
                    f"{name} must be a loader with a length (of a map-style data set), "
                    f"got a {type(loader).__name__}"
                )
            if len(loader) == 0:
                raise ValueError(f"{name} must have at least one batch, it is empty")
        with seeded(0):
            x, _, _ = unpack(next(iter(train)), "train")
        _, channels, height, width = x.shape
        self.shape = (channels, height, width)
        self.classes: tuple[str, ...] = tuple(
            map(str, getattr(getattr(train, "dataset", None), "classes", ()))
        )

    def samples(self, split: str) -> tuple[FloatBatches] | None:
        """Return a split as arguments of `evaluate`, None if there is none."""
        loader = getattr(self, split)
        return None if loader is None else (FloatBatches(loader, split),)


class LoaderBatches:
    """The batches of an own training loader, with the interface of `pyadv.data.Plan`.

    The generators of torch, NumPy and Python are seeded with (seed, epoch) while the loader starts
    and with (seed, epoch, number) while it makes a batch. In one process without workers an epoch
    therefore has the same order and the same random augmentation when a run is resumed in its
    middle. A sampler without a generator of its own has one, seeded anew, during each epoch.

    Args:
        loader: the loader.
        accelerator: divides the batches among its processes.
        seed: of the run.

    Raises:
        ValueError: if several processes cannot divide the batches.
    """

    def __init__(self, loader: Loader, accelerator: Accelerator, seed: int) -> None:
        self.device, self.seed = accelerator.device, seed
        several = accelerator.num_processes > 1
        if several:
            _check_divisible(loader)
        groups = getattr(loader, "batch_sampler", None)
        self.sampler: Any = getattr(groups, "sampler", getattr(loader, "sampler", None))
        draws = getattr(self.sampler, "generator", ...) is None
        self.order = torch.Generator() if draws else None
        known = draws or isinstance(self.sampler, SequentialSampler)
        self.can_skip = several or (type(groups) is BatchSampler and known)
        with self._ordered(0):  # else Accelerate gives the sampler a generator
            self.loader: Loader = accelerator.prepare(loader) if several else loader

    def __len__(self) -> int:
        return len(self.loader)

    @contextlib.contextmanager
    def _ordered(self, epoch: int) -> Iterator[None]:
        """Give a sampler that has no generator one that is seeded for `epoch`."""
        if self.order is None:
            yield
            return
        self.sampler.generator = self.order.manual_seed(mixed(self.seed, epoch))
        try:
            yield
        finally:
            self.sampler.generator = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (x, y, ids) of `epoch` from batch number `start` on, on the device."""
        with self._ordered(epoch):
            yield from self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        loader: Loader = self.loader
        number = 0
        if start and self.can_skip:  # other samplers may draw from torch's generator, so they run
            loader, number = skip_first_batches(loader, start), start
        with seeded(self.seed, epoch):
            batches = iter(loader)
        while True:
            with seeded(self.seed, epoch, number):
                batch = next(batches, None)
            if batch is None:
                return
            if number >= start:
                x, y, ids = unpack(batch, "train")
                x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
                ids = None if ids is None else ids.to(self.device, non_blocking=True)
                yield as_float(x), y, ids
            number += 1


def _check_divisible(loader: Any) -> None:
    """Raise ValueError unless Accelerate can divide the batches of `loader` among processes."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    shared = any(isinstance(sampler, DistributedSampler) for sampler in samplers)
    if not isinstance(loader, DataLoader) or shared:
        seen = "one with a DistributedSampler" if shared else f"a {type(loader).__name__}"
        raise ValueError(
            "train must be a DataLoader without a DistributedSampler: the processes divide its "
            f"batches; got {seen}"
        )


class FloatBatches:
    """A loader whose batches are (x, y) with float32 images."""

    def __init__(self, loader: Loader, name: str) -> None:
        self.loader, self.name = loader, name

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            x, y, _ = unpack(batch, self.name)
            yield as_float(x), y


def unpack(batch: Any, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (x, y, ids or None) of a batch of a loader. Raise ValueError for another form."""
    if isinstance(batch, Mapping):
        found = [
            next((batch[k] for k in keys if k in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS)
        ]
        parts = [*found, batch.get("ids")]
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        parts = [*batch, None][:3]
    else:
        parts = [None, None, None]
    x, y, ids = parts
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        seen = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else batch
        seen = seen if isinstance(seen, str) else f"a {type(batch).__name__}"
        raise ValueError(
            f"a batch of {name} must be (x, y), (x, y, ids) or a dict with one of "
            f"{', '.join(IMAGE_KEYS)} and one of {', '.join(LABEL_KEYS)}, got {seen}"
        )
    if x.dim() != 4 or y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(
            f"a batch of {name} must have x (B, C, H, W) and y (B,) int64, got x "
            f"{tuple(x.shape)} and y {tuple(y.shape)} {y.dtype}"
        )
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"x of {name} must be uint8 or floating in [0, 1], got {x.dtype}")
    if ids is not None and (ids.shape != y.shape or ids.dtype != torch.int64):
        raise ValueError(f"ids of {name} must be int64 ({len(y)},), got {ids.dtype} {ids.shape}")
    return x, y, ids
