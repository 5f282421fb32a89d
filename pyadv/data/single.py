"""Find data sets whose images are read one by one: folders, and data sets of other libraries."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pyadv import _imports
from pyadv.data.images import ImageData, hold_out, numbered
from pyadv.data.reading import SUFFIXES, ImageFiles, OwnSamples, Samples
from pyadv.data.streams import StreamedImages

_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation")
_HUGGING_FACE = ("dataset_dict.json", "dataset_info.json", "state.json")


def read(name: str, path: Path, image_size: int | None) -> StreamedImages | ImageData:
    """Return the data set at `path`, or the one called `name`; see `pyadv.data.load`.

    Raises:
        ValueError: if it is none of those that `load` lists.
        ImportError: if a library is needed and missing.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be >= 1, got {image_size}")
    if not path.exists():
        if name.startswith("torchvision:"):
            return _of_torchvision(name, image_size)
        return _own(name, image_size)
    if path.is_dir() and any((path / file).exists() for file in _HUGGING_FACE):
        return _hugging_face(path, image_size)
    if path.is_dir() and any(part.is_dir() for part in path.iterdir()):
        return _image_folder(path, image_size)
    raise ValueError(
        f"data: {path} is no .npz file, and no folder of idx files, of CIFAR batches, of images "
        "in a folder per class, or of a data set that Hugging Face's save_to_disk wrote"
    )


class _Part(Samples):
    """Some samples of a split."""

    def __init__(self, source: Samples, ids: Tensor) -> None:
        super().__init__(source.shape)
        self.source, self.ids = source, ids

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, i: int) -> str:
        return self.source.describe(int(self.ids[i]))

    def item(self, i: int, whole: bool) -> tuple[Tensor, int]:
        return self.source.item(int(self.ids[i]), whole)

    def known_labels(self) -> Tensor | None:
        known = self.source.known_labels()
        return None if known is None else known[self.ids]


def _without_split(source: Samples) -> tuple[Samples, Samples]:
    """Return a split into training and test samples, a fixed random fifth."""
    if len(source) < 5:
        raise ValueError(f"data: {len(source)} images are too few to hold a fifth out for the test")
    kept, held = hold_out(len(source), len(source) // 5, seed=0)
    return _Part(source, kept), _Part(source, held.sort().values)


def _image_folder(path: Path, image_size: int | None) -> StreamedImages:
    name = path.resolve().name
    train = next((path / split for split in _TRAIN if (path / split).is_dir()), None)
    test = next((path / split for split in _TEST if (path / split).is_dir()), None)
    has = train or test
    if has is None:
        classes = _folders(path)
        parts = _without_split(ImageFiles(path, classes, image_size))
        return StreamedImages(f"{name} (random fifth held out)", classes, *parts)
    if train is None or test is None:
        lacks = _TEST if test is None else _TRAIN
        raise ValueError(f"data: {path} has {has.name}/, but none of {', '.join(lacks)} beside it")
    classes = _folders(train)
    if strange := set(_folders(test)) - set(classes):
        raise ValueError(
            f"data: {test} has the classes {sorted(strange)[:3]}, which {train} does not have"
        )
    train_files = ImageFiles(train, classes, image_size)
    test_files = ImageFiles(
        test, classes, train_files.shape[1] if image_size is None else image_size
    )
    return StreamedImages(name, classes, train_files, test_files)


def _folders(path: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(
            f"data: {path} must hold a folder of images ({', '.join(SUFFIXES)}) for each class"
        )
    return tuple(names)


def _hugging_face(path: Path, image_size: int | None) -> StreamedImages:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(
            f"data: {path} is read by Hugging Face's datasets: pip install datasets"
        ) from error
    return _of_sets(path.resolve().name, load_from_disk(str(path)), image_size)


def _of_torchvision(name: str, image_size: int | None) -> StreamedImages:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another PyTorch
        raise ImportError(
            f"data {name!r} is read by torchvision: pip install torchvision ({error})"
        ) from error
    kind: Any = getattr(datasets, name.partition(":")[2], None)
    is_class = isinstance(kind, type)
    parameters = inspect.signature(kind).parameters if is_class else {}
    options = {"download": True} if "download" in parameters else {}
    if "train" in parameters:
        sets = [kind("data", train=train, **options) for train in (True, False)]
    elif "split" in parameters:
        sets = [kind("data", split="train", **options), None]
        for split in _TEST[:2]:
            try:
                sets[1] = kind("data", split=split, **options)
                break
            except ValueError:  # it has no such split
                continue
    if not parameters or not {"train", "split"} & parameters.keys() or sets[1] is None:
        raise ValueError(
            f"data {name!r} must be a data set of torchvision with training and test images"
        )
    return _of_sets(name.partition(":")[2], {"train": sets[0], "test": sets[1]}, image_size)


def _own(name: str, image_size: int | None) -> StreamedImages | ImageData:
    make = _imports.find(name, "data")
    if not callable(make):
        raise ValueError(f"data {name!r} must be callable, got a {type(make).__name__}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise ValueError(f"data {name!r} must be callable without arguments: {error}") from None
    made = make()
    if isinstance(made, ImageData):
        if image_size is not None:
            raise ValueError(f"data {name!r} returns an ImageData: image_size does not change it")
        return made
    if isinstance(made, (tuple, list)) and len(made) == 2:
        made = dict(zip(("train", "test"), made, strict=True))
    return _of_sets(name, made, image_size)


def _of_sets(name: str, sets: Any, image_size: int | None) -> StreamedImages:
    """Return a data set of its splits by name, or of one split alone."""
    if isinstance(sets, Mapping):
        found = [next((sets[s] for s in names if s in sets), None) for names in (_TRAIN, _TEST)]
        if None in found:
            raise ValueError(
                f"data {name!r} must have the splits train and test (or val), it has "
                f"{', '.join(map(str, sets))}"
            )
        train = OwnSamples(found[0], f"{name} (train)", image_size)
        test = OwnSamples(found[1], f"{name} (test)", image_size)
        classes = train.classes() or _counted(train, test)
        return StreamedImages(name, classes, train, test)
    whole = OwnSamples(sets, name, image_size)
    classes = whole.classes() or _counted(whole)
    return StreamedImages(f"{name} (random fifth held out)", classes, *_without_split(whole))


def _counted(*splits: Samples) -> tuple[str, ...]:
    """Return class names for a set that has none, () if its samples must be read to tell."""
    known = [y for split in splits if (y := split.known_labels()) is not None]
    return numbered(*known) if len(known) == len(splits) else ()
