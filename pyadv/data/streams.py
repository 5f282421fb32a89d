"""Image data that is read from disk batch by batch, by worker processes."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyadv import _imports
from pyadv.data.batches import Plan
from pyadv.data.images import MAX_CLASSES, ImageData, hold_out, numbered
from pyadv.data.reading import ResizedCrop, Samples, Shape, Transform

_SHARE = 0.25  # share of the free memory that a data set may take
_BATCH = 250  # images that are read at a time for an evaluation


@dataclass(frozen=True)
class StreamedImages:
    """A labelled image data set that stays on disk, with the methods of `ImageData`.

    Attributes:
        name: of the data set.
        classes: names of the classes; () until the samples have been read that tell their number.
        train: training samples.
        test: test samples; their images have the shape of the training images.
        workers: processes that read and decode, by default one per CPU core, at most 8.
        reason: why the data set is not in memory, for the message at the start of a run.
    """

    name: str
    classes: tuple[str, ...]
    train: Samples
    test: Samples
    workers: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be >= 0, got {self.workers}")
        self.test.shape = self.train.shape

    @property
    def shape(self) -> Shape:
        """(channels, height, width) of one image."""
        return self.train.shape

    @property
    def processes(self) -> int:
        """The number of processes that read."""
        return usual_workers() if self.workers is None else self.workers

    @property
    def residence(self) -> str:
        """One line that says where the images are."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.name} is streamed by {self.processes} workers{why}"

    @property
    def nbytes(self) -> int:
        """The size of all images as float32."""
        channels, height, width = self.shape
        return 4 * channels * height * width * (len(self.train) + len(self.test))

    def hold_out(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the ids of the training images kept, and of the `n` held out."""
        return hold_out(len(self.train), n, seed)

    def batches(self, batch_size: int, *, ids: Tensor, **settings: Any) -> StreamedBatches:
        """Return the training batches of the samples `ids`; `settings` are those of `Plan`."""
        return StreamedBatches(self, batch_size, ids=ids, **settings)

    def samples(self, split: str, ids: Tensor | None = None) -> tuple[SampleBatches]:
        """Return the samples `ids` of a split, by default all, as arguments of `evaluate`."""
        source = getattr(self, split)
        ids = torch.arange(len(source)) if ids is None else ids
        return (SampleBatches(source, ids, self.processes, len(self.classes) or MAX_CLASSES),)

    def read(self, split: str, ids: Tensor | slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the images and the labels of the samples `ids` of a split, by default all."""
        if isinstance(ids, slice):
            ids = torch.arange(len(getattr(self, split)))[ids]
        return self.samples(split, ids)[0].all()

    def in_memory(self) -> ImageData:
        """Read all images, and return them as an `ImageData`."""
        parts: dict[str, Tensor] = {}
        for split in ("train", "test"):
            x, y = self.read(split)
            parts |= {f"{split}_x": x, f"{split}_y": y}
        classes = self.classes or numbered(parts["train_y"], parts["test_y"])
        return ImageData(self.name, classes, **parts)


Images = ImageData | StreamedImages
"""An image data set of either kind."""


class _InMemory(Samples):
    """The training images of an `ImageData`, as uint8: transforms of images expect that."""

    def __init__(self, data: ImageData) -> None:
        super().__init__(data.shape)
        self.x, self.y = data.train_x, data.train_y

    def __len__(self) -> int:
        return len(self.y)

    def item(self, i: int, whole: bool) -> tuple[Tensor, int]:
        return self.x[i].mul(255).round().to(torch.uint8), int(self.y[i])


def transformed_batches(
    data: Images,
    batch_size: int,
    *,
    transform: str,
    workers: int | None = None,
    **settings: Any,
) -> StreamedBatches:
    """Return training batches of `data`, on which workers run the transform called `transform`.

    `settings` are those of `data.batches`.
    """
    if isinstance(data, ImageData):
        source = _InMemory(data)
        data = StreamedImages(data.name, data.classes, source, source, workers)
    made = find_transform(transform, data.shape)
    return StreamedBatches(data, batch_size, transform=made, **settings)


class SampleBatches:
    """Batches (x, y) of samples in a fixed order, float32 images in [0, 1], read anew each time."""

    def __init__(self, source: Samples, ids: Tensor, workers: int, classes: int) -> None:
        self.source, self.ids, self.workers, self.classes = source, ids, workers, classes

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        workers = min(self.workers, len(self) // _BATCH)  # a process costs more than a few images
        loader = _Loader(self.source, None, 0, workers, self.classes)
        for x, y, _ in loader.read(0, list(self.ids.split(_BATCH))):
            yield as_float(x), y

    def all(self) -> tuple[Tensor, Tensor]:
        """Return all samples in two tensors."""
        x = torch.empty(len(self), *self.source.shape)
        y = torch.empty(len(self), dtype=torch.int64)
        done = 0
        for part, labels in self:
            x[done : done + len(part)], y[done : done + len(part)] = part, labels
            done += len(part)
        return x, y


class StreamedBatches(Plan):
    """Training batches of a data set on disk.

    The samples, their order and the augmentation are those of `Batches`, whatever the number of
    workers. Images are uint8 until they are on the device. Memory holds the images of two batches
    per worker, whatever the size of the data set.

    Args:
        data: the data set.
        batch_size: as for `Plan`, and so are `settings`.
        ids: indices of the samples to use.
        transform: is called in the workers on each image at its own size, see `Samples.read`.
    """

    def __init__(
        self,
        data: StreamedImages,
        batch_size: int,
        *,
        ids: Tensor,
        transform: Transform | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(ids, batch_size, **settings)
        self.data = data
        self.loader = _Loader(
            data.train,
            transform,
            self.seed,
            data.processes,
            len(data.classes),
            pin=self.device.type == "cuda",
        )

    @property
    def shape(self) -> Shape:
        return self.data.shape

    def fetch(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.loader.read(epoch, batches):
            x, y, ids = (t.to(self.device, non_blocking=True) for t in batch)
            yield as_float(x), y, ids


def as_float(x: Tensor) -> Tensor:
    """Return images, uint8 or floating, as float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


class _Loader:
    """A DataLoader whose worker processes live as long as it, and which reads given batches."""

    def __init__(
        self,
        source: Samples,
        transform: Transform | None,
        seed: int,
        workers: int,
        classes: int,
        pin: bool = False,
    ) -> None:
        self.source, self.classes = source, classes
        self._keys = _Keys()
        self._loader: DataLoader[Any] = DataLoader(
            _Items(source, transform, seed),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_leave_signals if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),  # else each epoch would draw from torch's own
        )

    def read(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x, y, ids) for each tensor of ids.

        Raises ValueError for a sample that cannot be read and for a label out of range.
        """
        self._keys.epoch, self._keys.batches = epoch, batches
        for batch in self._loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            bad = (batch[1] < 0) | (batch[1] >= self.classes)
            if bad.any():
                i, y = int(batch[2][bad][0]), int(batch[1][bad][0])
                raise ValueError(
                    f"the label of {self.source.describe(i)} must lie in [0, {self.classes:,}), "
                    f"got {y}"
                )
            yield batch


class _Keys:
    """The batch sampler of a DataLoader: the keys (epoch, id) of the samples of each batch.

    It is no part of `_Loader`: in a cycle of references the processes would outlive their use.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for ids in self.batches:
            yield [(self.epoch, i) for i in ids.tolist()]


class _Items(Dataset[Any]):
    """What a worker process holds: it turns a key (epoch, id) into a sample, or into the message of
    an error, which survives the way between processes better than its exception does.
    """

    def __init__(self, source: Samples, transform: Transform | None, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | str:
        epoch, i = key
        try:
            return *self.source.read(i, self.transform, (self.seed, epoch)), i
        except ValueError as error:
            return str(error)


def _collate(items: list[Any]) -> tuple[Tensor, Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, y, ids = zip(*items, strict=True)
    if len({image.dtype for image in images}) > 1:
        images = tuple(as_float(image) for image in images)
    return torch.stack(images), torch.tensor(y), torch.tensor(ids)


def _leave_signals(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def find_transform(name: str, shape: Shape) -> Transform:
    """Return the transform called `name` of an image, a uint8 tensor (C, any height, any width).

    - "resized-crop": see `ResizedCrop`;
    - "v2:NAME": a class of torchvision.transforms.v2 with its default arguments;
    - "package.module:name": a transform, or a class or function that makes it if it is called
      without arguments.

    Raises:
        ValueError: if there is no such transform.
        ImportError: if torchvision is needed and is missing.
    """
    if name == "resized-crop":
        return ResizedCrop(shape[1:])
    if name.startswith("v2:"):
        return _of_torchvision(name.partition(":")[2])
    if ":" not in name:
        raise ValueError(
            f"transform must be resized-crop, v2:NAME or package.module:name, got {name!r}"
        )
    found = _imports.find(name, "transform")
    made = found() if _is_factory(name, found) else found
    if not callable(made):
        raise ValueError(f"transform {name!r} must be callable, got a {type(made).__name__}")
    return made


def _is_factory(name: str, found: Any) -> bool:
    """Return whether `found` makes a transform, rather than being one.

    Raises ValueError for a class or function that can be neither.
    """
    if not (isinstance(found, type) or hasattr(found, "__code__")):
        return False
    signature = inspect.signature(found)
    try:
        signature.bind()
        return True
    except TypeError as error:
        if not isinstance(found, type):
            with contextlib.suppress(TypeError):
                signature.bind(None)  # an image
                return False
        raise ValueError(
            f"transform {name!r} must be a function of an image, or be callable without arguments "
            f"and return a transform: {error}"
        ) from None


def _of_torchvision(name: str) -> Transform:
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another PyTorch
        raise ImportError(
            f"transform 'v2:{name}' needs torchvision: pip install torchvision ({error})"
        ) from error
    kind = getattr(v2, name, None)
    if not isinstance(kind, type):
        raise ValueError(f"transform 'v2:{name}': torchvision.transforms.v2 has no {name!r}")
    try:
        return kind()
    except TypeError as error:
        raise ValueError(
            f"transform 'v2:{name}' needs arguments ({error}): write a function that returns it, "
            "and name that as package.module:name"
        ) from None


def usual_workers() -> int:
    """Return the number of reading processes by default: this process's share of the cores, at most
    8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (cores or 1) // _processes()))


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still take, None if nothing tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(v.split()[1]) for v in lines if v.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        found += [int(limit) - int(used)] if limit.isdigit() else []
    except (OSError, ValueError, IndexError):
        pass
    return min(found) // _processes() if found else None


def _processes() -> int:
    """Return how many processes of this run share the machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))


def placed(data: StreamedImages, stream: bool | None, whole_images: bool = False) -> Images:
    """Return the data set in memory or streamed: as `stream` says, else by its size.

    Images in memory are cut and resized. `whole_images` therefore streams them.

    Raises:
        ValueError: if `whole_images` are not to be streamed.
    """
    if whole_images and stream is False:
        raise ValueError(
            f"stream=False does not go with a transform of {data.name}: it sees images at their "
            "own size, images in memory are cut and resized; leave stream or the transform out"
        )
    if whole_images and stream is None:
        data, stream = replace(data, reason="the transform sees images at their own size"), True
    if stream is None:
        free = free_memory()
        limit = _SHARE * (free if free is not None else 8e9)
        stream = data.nbytes > limit
        why = f"{data.nbytes / 1e9:.1f} GB as float32 are more than a quarter of the free memory"
        data = replace(data, reason=why if stream else "")
    if not stream:
        return data.in_memory()
    classes = data.classes or numbered(data.train.labels(), data.test.labels())
    return replace(data, classes=classes)
