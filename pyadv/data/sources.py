"""Readers: idx files, CIFAR batches, npz and torchvision sets, all returning `ImageData`."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyadv.data.images import ImageData, to_images

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
IDX_STEMS = {"train": "train", "test": "t10k"}  # the names LeCun's files have kept
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def load(source: str | Path = "fashion-mini", *, layout: str | None = None) -> ImageData:
    """Load a data set.

    `source` is one of

    - `"fashion-mini"`: the embedded set, the first 10,000 training and 2,000 test images of
      Fashion-MNIST (Xiao et al. 2017, MIT licence), 28x28 grey, 10 classes;
    - a folder of idx files (`train-images-idx3-ubyte`, plain, `.gz` or `.xz`): MNIST and
      its relatives;
    - a folder of CIFAR-10 or CIFAR-100 python batches;
    - an `.npz` file with `x_train, y_train, x_test, y_test`, or with `x, y`, of which a
      fixed random fifth is then held out as the test split; `layout` is that of
      `to_images`;
    - a torchvision set by name (`cifar10`, `svhn`, ...), downloaded to `./data`.

    Raises ValueError for a source it cannot read, FileNotFoundError for a path that is not there,
    ImportError where torchvision is needed and missing.
    """
    name = str(source)
    if name in EMBEDDED:
        folder = Path(__file__).parent / name.replace("-", "_")
        return _read_idx_folder(folder, name, EMBEDDED[name])
    if name in TORCHVISION:
        return _read_torchvision(name)
    path = Path(source).expanduser()
    if not path.exists():
        names = ", ".join((*EMBEDDED, *TORCHVISION))
        raise FileNotFoundError(f"data: {name!r} is neither a path nor one of {names}")
    if path.suffix == ".npz":
        return _read_npz(path, layout)
    for file, reader in _FOLDERS.items():
        if path.is_dir() and any(path.glob(file)):
            return reader(path)
    raise ValueError(
        f"data: {path} is not an .npz file or a folder that holds one of {', '.join(_FOLDERS)}"
    )


def read_idx(path: Path) -> Tensor:
    """Read one idx file of unsigned bytes (plain, .gz or .xz) as a uint8 tensor."""
    with _OPENERS.get(path.suffix, open)(path, "rb") as file:
        raw = file.read()
    rank = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * rank:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", rank, 4).tolist()
    start = 4 + 4 * rank
    if len(raw) - start != int(np.prod(shape)):
        raise ValueError(
            f"{path}: its header says shape {shape}, it holds {len(raw) - start} bytes"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def find_idx(folder: Path, split: str, kind: str) -> Path:
    """Path of `<split>-<kind>-idx?-ubyte` in `folder`; kind is "images" or "labels"."""
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
        parts[f"{split}_x"] = to_images("idx images", read_idx(find_idx(folder, split, "images")))
        parts[f"{split}_y"] = read_idx(find_idx(folder, split, "labels")).long()
    classes = classes or _numbered(parts["train_y"], parts["test_y"])
    return ImageData(name=name or folder.resolve().name, classes=classes, **parts)


def _read_cifar10(folder: Path) -> ImageData:
    train = [_unpickle(folder / f"data_batch_{i}") for i in range(1, 6)]
    test = _unpickle(folder / "test_batch")
    classes = _unpickle(folder / "batches.meta")[b"label_names"]
    return _cifar("cifar10", train, test, b"labels", classes)


def _read_cifar100(folder: Path) -> ImageData:
    classes = _unpickle(folder / "meta")[b"fine_label_names"]
    train, test = _unpickle(folder / "train"), _unpickle(folder / "test")
    return _cifar("cifar100", [train], test, b"fine_labels", classes)


def _cifar(name: str, train: list[dict], test: dict, key: bytes, classes: list) -> ImageData:
    def split(batches: list[dict]) -> tuple[Tensor, Tensor]:
        x = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32)
        y = [label for b in batches for label in b[key]]
        return to_images(name, torch.from_numpy(x), "NCHW"), torch.tensor(y)

    train_x, train_y = split(train)
    test_x, test_y = split([test])
    classes = tuple(c.decode() if isinstance(c, bytes) else c for c in classes)
    return ImageData(name, classes, train_x, train_y, test_x, test_y)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and builtin containers only: a pickle from the web may run any code."""

    ALLOWED = frozenset({"_reconstruct", "scalar", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str):
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR batch")


def _unpickle(path: Path) -> dict:
    return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()


def _read_npz(path: Path, layout: str | None) -> ImageData:
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train, test = [(arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test")]
        name = path.stem
    elif {"x", "y"} <= arrays.keys():
        x, y = arrays["x"], arrays["y"]
        order = np.random.default_rng(0).permutation(len(x))
        cut = len(x) // 5
        train, test = (x[order[cut:]], y[order[cut:]]), (x[order[:cut]], y[order[:cut]])
        name = f"{path.stem} (random fifth held out)"
    else:
        raise ValueError(
            f"{path} must hold x_train, y_train, x_test, y_test, or x, y; it holds {sorted(arrays)}"
        )
    splits = [
        (to_images(f"x of {path.name}", torch.from_numpy(x), layout), _labels(path, y))
        for x, y in (train, test)
    ]
    classes = _numbered(splits[0][1], splits[1][1])
    return ImageData(name, classes, *splits[0], *splits[1])


def _labels(path: Path, y: np.ndarray) -> Tensor:
    y = y.squeeze(-1) if y.ndim == 2 and y.shape[1] == 1 else y  # Keras keeps CIFAR labels (N, 1)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(f"y of {path.name} must be integer (N,), got {y.dtype} {y.shape}")
    return torch.from_numpy(y.astype(np.int64))


def _read_torchvision(name: str, root: str = "data") -> ImageData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"data set {name!r} is read by torchvision: pip install 'pyadv[vision]', "
            "or pass a folder of its files"
        ) from error
    kind = getattr(datasets, TORCHVISION[name])
    svhn = name == "svhn"  # the one with another argument and another attribute
    splits, sets = [], []
    for train in (True, False):
        split = {"split": "train" if train else "test"} if svhn else {"train": train}
        sets.append(kind(root, download=True, **split))
        x = torch.as_tensor(sets[-1].data)
        y = torch.as_tensor(sets[-1].labels if svhn else sets[-1].targets).long()
        splits.append((to_images(name, x), y))
    classes = getattr(sets[0], "classes", None) or _numbered(splits[0][1], splits[1][1])
    return ImageData(name, tuple(classes), *splits[0], *splits[1])


def _numbered(*labels: Tensor) -> tuple[str, ...]:
    """Class names for sets that bring none: one past the largest label."""
    return tuple(str(i) for i in range(max(int(y.max()) for y in labels if len(y)) + 1))


_FOLDERS = {
    "train-images-idx3-ubyte*": _read_idx_folder,
    "data_batch_1": _read_cifar10,
    "meta": _read_cifar100,
}
