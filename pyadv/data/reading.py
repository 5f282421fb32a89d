"""Read the samples of a split one by one: image files, and data sets of other libraries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv.data.seeds import seeded

Shape = tuple[int, int, int]
Transform = Callable[[Tensor], Tensor]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# Keys of a sample or a batch that is a dict, the first that is there: those of Hugging Face's sets.
IMAGE_KEYS = ("image", "img", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "y")
_MARGIN = 7 / 8  # share of the shorter side that a fitted image keeps, as 224 of 256
_PROBED = 16  # images by which the size and the channels of a data set are found
_GREY = ("1", "L", "I;16")  # modes of PIL


class Samples:
    """The samples of one split. A subclass reads them in `image` and `label`.

    Args:
        shape: (C, H, W) of every image; one of another size is resized and cut to it, see `fit`.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __len__(self) -> int:
        raise NotImplementedError

    def describe(self, i: int) -> str:
        """Return a name of sample `i` for error messages."""
        return f"sample {i}"

    def item(self, i: int, whole: bool) -> tuple[Tensor, int]:
        """Return sample `i`: (C, any height, any width), uint8 or floating in [0, 1]; its label.

        Unless the `whole` image is asked for, the reader may decode it at a smaller size.
        """
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Return all labels, int64. This reads every sample where `known_labels` are None."""
        known = self.known_labels()
        if known is None:
            return torch.tensor([self.item(i, False)[1] for i in range(len(self))])
        return known

    def known_labels(self) -> Tensor | None:
        """Return all labels, int64, if they are known without reading the samples."""
        return None

    def read(
        self, i: int, transform: Transform | None = None, key: tuple[int, ...] = ()
    ) -> tuple[Tensor, int]:
        """Return sample `i`: its image of the shape of the split, and its label.

        The generators of torch, NumPy and Python are seeded with `key` and `i` while `transform`
        runs, so its result does not depend on the process or on the order of the samples.

        Raises:
            ValueError: if the image cannot be read or is of another kind; the message names it.
        """
        try:
            x, y = self.item(i, transform is not None)
            if transform is not None:
                with seeded(*key, i):
                    x = transform(x)
                x = to_tensor(x)
            return fit(x, self.shape), y
        except (ValueError, TypeError, OSError, RuntimeError, SyntaxError) as error:
            raise ValueError(f"{self.describe(i)} cannot be read: {error}") from error


class ImageFiles(Samples):
    """Image files of any size in one folder per class.

    The paths are kept in one array: a list of a million strings would be copied into every worker
    process, page by page, as its reference counts change.

    Args:
        folder: the split; it holds a folder for each of `classes`, or for some of them.
        classes: names of the classes.
        image_size: height and width; None if the files have one size.
    """

    def __init__(
        self, folder: Path, classes: tuple[str, ...], image_size: int | None = None
    ) -> None:
        self.folder = folder
        text, ends, labels = bytearray(), [0], []
        for label, name in enumerate(classes):
            for path in _files(folder / name):
                text += os.fsencode(os.path.relpath(path, folder))
                ends.append(len(text))
                labels.append(label)
        if not labels:
            raise ValueError(f"data: {folder} holds no image files ({', '.join(SUFFIXES)})")
        self._text, self._ends = np.frombuffer(bytes(text), np.uint8), np.array(ends)
        self._labels = torch.tensor(labels)
        super().__init__(self._find_shape(image_size))

    def __len__(self) -> int:
        return len(self._labels)

    def describe(self, i: int) -> str:
        return str(self.path(i))

    def path(self, i: int) -> Path:
        """Return the path of image `i`."""
        return self.folder / os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]].tobytes())

    def known_labels(self) -> Tensor:
        return self._labels

    def item(self, i: int, whole: bool) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.path(i)) as image:
            if not whole:  # a JPEG is decoded at a fraction of its size, which saves most of it
                image.draft(None, tuple(round(side / _MARGIN) for side in self.shape[:0:-1]))
            return to_tensor(image.convert("L" if self.shape[0] == 1 else "RGB")), int(
                self._labels[i]
            )

    def _find_shape(self, image_size: int | None) -> Shape:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("data: image files need Pillow: pip install pillow") from error
        sizes, modes = set(), set()
        for i in {*np.linspace(0, len(self) - 1, _PROBED).astype(int).tolist()}:
            try:
                with Image.open(self.path(i)) as image:
                    sizes.add(image.size)
                    modes.add(image.mode)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{self.path(i)} cannot be read: {error}") from error
        if image_size is None and len(sizes) > 1:
            seen = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
            raise ValueError(
                f"data: the images in {self.folder} have sizes such as {seen}: say with image_size "
                "(--image-size 224) what they are resized and cut to"
            )
        channels = 1 if modes <= {*_GREY} else 3
        width, height = (image_size, image_size) if image_size else sizes.pop()
        return channels, height, width


class OwnSamples(Samples):
    """A map-style data set of another library: `len(data)`, and `data[i]` is (image, label, ...) or
    a dict.

    An image is one of PIL, a uint8 or floating tensor (C, H, W), or a NumPy array (H, W) or
    (H, W, C). The keys of a dict are those of Hugging Face's data sets.

    Args:
        data: the data set.
        name: the argument it came from, for error messages.
        image_size: height and width, by default those of the first image.
    """

    def __init__(self, data: Any, name: str, image_size: int | None = None) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"{name} must be a data set with __len__ and __getitem__, so that each sample has "
                f"a number; got a {type(data).__name__}"
            )
        if len(data) == 0:
            raise ValueError(f"{name} holds no samples")
        self.data, self.name = data, name
        first = self.item(0, False)[0]
        channels, height, width = first.shape
        height, width = (image_size, image_size) if image_size else (height, width)
        super().__init__((channels, height, width))

    def __len__(self) -> int:
        return len(self.data)

    def describe(self, i: int) -> str:
        return f"{self.name}: sample {i}"

    def item(self, i: int, whole: bool) -> tuple[Tensor, int]:
        item = self.data[i]
        if isinstance(item, Mapping):
            x, y = (self._entry(item, names) for names in (IMAGE_KEYS, LABEL_KEYS))
        elif isinstance(item, (tuple, list)) and len(item) >= 2:
            x, y = item[:2]
        else:
            raise ValueError(
                f"{self.name}: a sample must be (image, label) or a dict, got a "
                f"{type(item).__name__}"
            )
        return to_tensor(x), int(y)

    def known_labels(self) -> Tensor | None:
        if getattr(self.data, "target_transform", None) is not None:
            return None  # the lists below hold the labels as they were before it
        for found in (
            getattr(self.data, "targets", None),
            getattr(self.data, "labels", None),
            getattr(self.data, "tensors", (None, None))[1:2],
        ):
            found = found[0] if isinstance(found, tuple) and len(found) == 1 else found
            if found is not None and len(found) == len(self):
                return torch.as_tensor(found).long()
        column = next((n for n in LABEL_KEYS if n in getattr(self.data, "column_names", ())), None)
        return None if column is None else torch.as_tensor(self.data[column][:]).long()

    def classes(self) -> tuple[str, ...] | None:
        """Return the names of the classes, None if the data set does not tell."""
        names = getattr(self.data, "classes", None)
        features = getattr(self.data, "features", None)
        if names is None and isinstance(features, Mapping):
            column = next((n for n in LABEL_KEYS if n in features), None)
            names = getattr(features.get(column), "names", None)
        return tuple(map(str, names)) if names is not None else None

    def _entry(self, item: Mapping[Any, Any], names: tuple[str, ...]) -> Any:
        name = next((n for n in names if n in item), None)
        if name is None:
            raise ValueError(
                f"{self.name}: a sample has {', '.join(map(str, item))}; it must have one of "
                f"{', '.join(names)}"
            )
        return item[name]


def to_tensor(image: Any) -> Tensor:
    """Return an image as a tensor (C, H, W), uint8 or float32 in [0, 1].

    Raises ValueError for anything that is not an image.
    """
    if hasattr(image, "getbands"):  # PIL
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in _GREY else "RGB")
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        x = torch.from_numpy(np.array(image))  # a copy that may be written to
        x = x[None] if x.dim() == 2 else x.permute(2, 0, 1) if x.dim() == 3 else x
    elif isinstance(image, Tensor):
        x = image.detach()
        x = x[None] if x.dim() == 2 else x
    else:
        raise ValueError(f"an image must be of PIL, a tensor or an array, got {type(image)}")
    if x.dim() != 3 or x.shape[0] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"an image must be (1 or 3, height, width), got {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x.contiguous()
    if not x.is_floating_point():
        raise ValueError(f"an image must be uint8 or floating in [0, 1], got {x.dtype}")
    low, high = (v.item() for v in x.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"an image must lie in [0, 1], saw [{low:g}, {high:g}]: leave the normalisation to the "
            "network (mean and std)"
        )
    return x.float().contiguous()


def fit(x: Tensor, shape: Shape) -> Tensor:
    """Return the image (C, H, W) with the given shape.

    One of another size is cut to the middle 7/8 of its shorter side, at the proportions of `shape`,
    and resized: as "resize to 256, cut out 224". Grey images get three equal channels where needed.
    """
    if x.shape[0] == 1 and shape[0] == 3:
        x = x.expand(3, -1, -1)
    if x.shape[0] != shape[0]:
        raise ValueError(f"the image has {x.shape[0]} channels, the others have {shape[0]}")
    if x.shape[1:] == shape[1:]:
        return x.contiguous()
    height, width = x.shape[1:]
    scale = _MARGIN * min(height / shape[1], width / shape[2])
    box = [max(1, round(scale * side)) for side in shape[1:]]
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    return resize(x[:, top : top + box[0], left : left + box[1]], shape[1:])


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the image (C, H, W) at another size, by antialiased bilinear interpolation."""
    images = x[None].contiguous()
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)[0]


class ResizedCrop:
    """The random crop of ImageNet's training: a box of 8 to 100 % of the area, with proportions of
    3/4 to 4/3, is resized, and mirrored half of the time.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:]
        for _ in range(10):
            area = height * width * (0.08 + 0.92 * torch.rand(()).item())
            ratio = (3 / 4) * (16 / 9) ** torch.rand(()).item()
            h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < h <= height and 0 < w <= width:
                break
        else:
            h = w = min(height, width)
        top = int(torch.randint(height - h + 1, ()))
        left = int(torch.randint(width - w + 1, ()))
        x = resize(x[:, top : top + h, left : left + w], self.size)
        return x.flip(2) if torch.rand(()) < 0.5 else x


def _files(folder: Path) -> Iterator[str]:
    """Yield the image files below a folder, in an order that depends on their names alone."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(place, name)
