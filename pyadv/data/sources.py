"""Find a data set by its name or path, and read it."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import lzma
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyadv import _imports
from pyadv._names import did_you_mean
from pyadv.data import single
from pyadv.data.images import ImageData, Layout, numbered, to_images
from pyadv.data.streams import Images, placed

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
EMBEDDED = {"fashion-mini": FASHION_CLASSES}
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}
IDX_STEMS = {"train": "train", "test": "t10k"}  # as in LeCun's file names
_Opener = Callable[[Path, Literal["rb"]], io.BufferedIOBase]
_OPENERS: dict[str, _Opener] = {".gz": gzip.open, ".xz": lzma.open}


def load(
    source: str | Path = "fashion-mini",
    *,
    layout: Layout | None = None,
    image_size: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
    whole_images: bool = False,
) -> Images:
    """Load a data set.

    `source` is one of

    - `"fashion-mini"`: the embedded set, the first 10,000 training and 2,000 test images of
      Fashion-MNIST (Xiao et al. 2017, MIT licence), 28x28 grey, 10 classes;
    - a folder of idx files (`train-images-idx3-ubyte`, plain, `.gz` or `.xz`): MNIST and
      its relatives;
    - a folder of CIFAR-10 or CIFAR-100 python batches;
    - an `.npz` file with `x_train, y_train, x_test, y_test`, or with `x, y`, of which a
      fixed random fifth becomes the test split; `layout` is that of `to_images`;
    - a torchvision set by name (`cifar10`, `svhn`, ...), downloaded to `./data`;
    - `torchvision:NAME`, any set of torchvision with training and test images and one label each;
    - a folder of image files: `train/` with a folder per class, and `test/` or `val/` with the
      same; or folders per class alone, of which a fixed random fifth becomes the test split;
    - a folder that Hugging Face's `save_to_disk` wrote;
    - `package.module:name`, a function without arguments that returns an `ImageData`, or training
      and test data sets of PyTorch, as a pair or as a dict with the keys train and test.

    The last four are read image by image. They are loaded into memory if a quarter of what is free
    holds them as float32, and streamed by worker processes otherwise. Images in memory have been
    cut and resized, so a set whose `whole_images` a transform needs is always streamed.

    Sets without class names have the classes 0 to the largest label, which must be below
    100,000.

    Args:
        source: as above.
        layout: of the images in an `.npz` file, "NCHW" or "NHWC", where the shape does not tell.
        image_size: height and width to which single images are resized and cut.
        stream: whether single images are streamed; None decides by the size.
        workers: processes that read streamed images, by default one per CPU core, at most 8.
        whole_images: whether single images are streamed because a transform needs them at their own
            size.

    Raises:
        ValueError: for a source that cannot be read, for options that it does not have, and for
            `stream=False` with `whole_images`.
        FileNotFoundError: for a path that does not exist.
        ImportError: if a library is needed and missing.
    """
    name, path = str(source), _path(source)
    read = _whole(name, path, layout)
    if read is not None:
        given = {"image_size": image_size is not None, "stream": bool(stream)}
        if wrong := [option for option, is_given in given.items() if is_given]:
            raise ValueError(
                f"{wrong[0]} is for data sets that are read image by image; {name} is read whole"
            )
        return read()
    if not (path.exists() or _imports.is_import_path(name)):
        known = (*EMBEDDED, *TORCHVISION)
        raise FileNotFoundError(
            f"data: {name!r} is neither a path nor one of {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    data = single.read(name, path, image_size)
    if isinstance(data, ImageData):
        return data
    return placed(dataclasses.replace(data, workers=workers), stream, whole_images)


def _whole(name: str, path: Path, layout: Layout | None) -> Callable[[], ImageData] | None:
    """Return the reader of a data set that is read whole, None for any other."""
    if name in EMBEDDED:
        folder = Path(__file__).parent / name.replace("-", "_")
        return lambda: _read_idx_folder(folder, name, EMBEDDED[name])
    if name in TORCHVISION:
        return lambda: _read_torchvision(name)
    if path.suffix == ".npz" and path.exists():
        return lambda: _read_npz(path, layout)
    for file, reader in _FOLDERS.items():
        if path.is_dir() and any(path.glob(file)):
            return lambda: reader(path)
    return None


def _path(source: str | Path) -> Path:
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # ~name without such a user is a name like any other
        path = path.expanduser()
    return path


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes (plain, .gz or .xz) as a uint8 tensor.

    Raises ValueError for a file that is not one, or that is damaged.
    """
    with _reading(path), _OPENERS.get(path.suffix, open)(path, "rb") as file:
        raw = file.read()
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * rank:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", rank, 4).tolist()
    start = 4 + 4 * rank
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path}: its header says shape {shape}, it holds {len(raw) - start} bytes"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def find_idx(folder: Path, split: str, kind: str) -> Path:
    """Return the path of `<split>-<kind>-idx?-ubyte` in `folder`; kind is "images" or "labels".

    Raises FileNotFoundError if there is none.
    """
    stem = f"{IDX_STEMS[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    for suffix in ("", ".gz", ".xz"):
        if (folder / (stem + suffix)).exists():
            return folder / (stem + suffix)
    raise FileNotFoundError(f"{folder} lacks {stem} (plain, .gz or .xz)")


def _read_idx_folder(
    folder: Path, name: str | None = None, classes: tuple[str, ...] | None = None
) -> ImageData:
    parts = {}
    for split in IDX_STEMS:
        x, y = (find_idx(folder, split, kind) for kind in ("images", "labels"))
        parts[f"{split}_x"] = to_images(str(x), read_idx(x))
        parts[f"{split}_y"] = read_idx(y).long()
        _check_lengths(str(x), len(parts[f"{split}_x"]), str(y), len(parts[f"{split}_y"]))
    classes = classes or numbered(parts["train_y"], parts["test_y"])
    return ImageData(name=name or folder.resolve().name, classes=classes, **parts)


def _read_cifar10(folder: Path) -> ImageData:
    train = [folder / f"data_batch_{i}" for i in range(1, 6)]
    names = _unpickle(folder / "batches.meta", b"label_names")
    return _cifar("cifar10", train, folder / "test_batch", b"labels", names)


def _read_cifar100(folder: Path) -> ImageData:
    names = _unpickle(folder / "meta", b"fine_label_names")
    return _cifar("cifar100", [folder / "train"], folder / "test", b"fine_labels", names)


def _cifar(
    name: str, train: list[Path], test: Path, key: bytes, names: tuple[Any, ...]
) -> ImageData:
    train_x, train_y = _cifar_split(train, key)
    test_x, test_y = _cifar_split([test], key)
    classes = tuple(c.decode() if isinstance(c, bytes) else str(c) for c in names[0])
    return ImageData(name, classes, train_x, train_y, test_x, test_y)


def _cifar_split(files: list[Path], key: bytes) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for file in files:
        x, y = _unpickle(file, b"data", key)
        with _reading(file):
            x, y = np.asarray(x).reshape(-1, 3, 32, 32), _integers(y)
        _check_lengths(f"images of {file}", len(x), "its labels", len(y))
        images.append(to_images(str(file), torch.from_numpy(x), "NCHW"))
        labels.append(y)
    return torch.cat(images), torch.cat(labels)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of arrays and builtin containers alone: any other pickle could run code."""

    ALLOWED = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR batch")


def _unpickle(path: Path, *keys: bytes) -> tuple[Any, ...]:
    """Return the values of `keys` in the pickled dict at `path`."""
    with _reading(path):
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if absent := [key.decode() for key in keys if key not in batch]:
            raise ValueError(f"it lacks {', '.join(absent)}")
        return tuple(batch[key] for key in keys)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged file into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system names the file and the reason
        why = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read, it may be damaged: {why}") from error


def _read_npz(path: Path, layout: Layout | None) -> ImageData:
    with _reading(path), np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name; write it with numpy.savez")
        arrays = {key: file[key] for key in file.files}
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train, test = [(arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test")]
        name = path.stem
    elif {"x", "y"} <= arrays.keys():
        x, y = arrays["x"], arrays["y"]
        if x.ndim == 0 or y.ndim == 0:
            raise ValueError(f"x and y of {path.name} must be arrays, got single numbers")
        _check_lengths(f"x of {path}", len(x), "y", len(y))
        order = np.random.default_rng(0).permutation(len(x))
        cut = len(x) // 5
        train, test = (x[order[cut:]], y[order[cut:]]), (x[order[:cut]], y[order[:cut]])
        name = f"{path.stem} (random fifth held out)"
    else:
        raise ValueError(
            f"{path} must hold x_train, y_train, x_test, y_test, or x, y; it holds {sorted(arrays)}"
        )
    splits = [(_pixels(path, x, layout), _labels(path, y)) for x, y in (train, test)]
    for part, (images, labels) in zip(("training", "test"), splits, strict=True):
        _check_lengths(f"{part} images of {path}", len(images), "labels", len(labels))
    classes = numbered(splits[0][1], splits[1][1])
    return ImageData(name, classes, *splits[0], *splits[1])


def _pixels(path: Path, x: np.ndarray, layout: Layout | None) -> Tensor:
    if x.dtype.kind not in "uif":
        raise ValueError(f"x of {path.name} must be uint8 or floating in [0, 1], got {x.dtype}")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)  # torch knows the machine's byte order only
    if x.dtype.itemsize > 8:
        x = x.astype(np.float64)
    return to_images(f"x of {path.name}", torch.from_numpy(x), layout)


def _labels(path: Path, y: np.ndarray) -> Tensor:
    y = y.squeeze(-1) if y.ndim == 2 and y.shape[1] == 1 else y  # Keras has CIFAR's as (N, 1)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(f"y of {path.name} must be integer (N,), got {y.dtype} {y.shape}")
    return _integers(y)


def _integers(y: Any) -> Tensor:
    """Return labels as int64; raise ValueError for any that are not int64 numbers."""
    y = np.asarray(y)
    if y.dtype.kind not in "iu" or (len(y) and int(y.max()) >= 2**63):
        seen = f"{int(y.max())}" if y.dtype.kind in "iu" else f"{y.dtype}"
        raise ValueError(f"labels must be class numbers, got {seen}")
    return torch.from_numpy(y.astype(np.int64))


def _check_lengths(images: str, n: int, labels: str, m: int) -> None:
    if n != m:
        raise ValueError(f"{images} and {labels} must be as many, got {n} and {m}")


def _read_torchvision(name: str, root: str = "data") -> ImageData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"data set {name!r} is read by torchvision: pip install 'pyadv[vision]', "
            "or pass a folder of its files"
        ) from error
    kind = getattr(datasets, TORCHVISION[name])
    svhn = name == "svhn"  # its class has another argument and another attribute
    splits, sets = [], []
    for train in (True, False):
        split = {"split": "train" if train else "test"} if svhn else {"train": train}
        sets.append(kind(root, download=True, **split))
        x = torch.as_tensor(sets[-1].data)
        y = torch.as_tensor(sets[-1].labels if svhn else sets[-1].targets).long()
        splits.append((to_images(name, x), y))
    classes = getattr(sets[0], "classes", None) or numbered(splits[0][1], splits[1][1])
    return ImageData(name, tuple(classes), *splits[0], *splits[1])


_FOLDERS = {
    "train-images-idx3-ubyte*": _read_idx_folder,
    "data_batch_1": _read_cifar10,
    "meta": _read_cifar100,
}
