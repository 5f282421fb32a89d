"""The form of every image data set: float32 images in [0, 1], NCHW, and int64 labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pyadv.data.batches import Batches

Layout: TypeAlias = Literal["NCHW", "NHWC"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
MAX_CLASSES = 100_000  # of a set without class names: a larger label is no class number


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set, split into training and test samples.

    `train_x` and `test_x` are float32 (N, C, H, W) in [0, 1]; `train_y` and `test_y` are
    int64 (N,) in [0, len(classes)). The constructor raises ValueError for anything else: wrong
    ranks, shapes that differ between the splits, NaN, pixels or labels out of range.
    """

    name: str
    classes: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def __post_init__(self) -> None:
        check_images("train_x", self.train_x, self.train_y, len(self.classes))
        check_images("test_x", self.test_x, self.test_y, len(self.classes))
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"{self.name}: train and test images must have one shape, "
                f"got {tuple(self.train_x.shape[1:])} and {tuple(self.test_x.shape[1:])}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.train_x.shape
        return channels, height, width

    def hold_out(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the ids of the training images kept, and of the `n` held out.

        The choice depends on `seed` alone. At least one training image must remain.
        """
        return hold_out(len(self.train_y), n, seed)

    def batches(self, batch_size: int, *, ids: Tensor, **settings: Any) -> Batches:
        """Return the training batches of the samples `ids`; `settings` are those of `Plan`."""
        return Batches(self.train_x, self.train_y, batch_size, ids=ids, **settings)

    def read(self, split: str, ids: Tensor | slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the images and the labels of the samples `ids` of a split, by default all."""
        return self.samples(split, ids)

    def samples(self, split: str, ids: Tensor | slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the samples `ids` of a split, by default all, as arguments of `evaluate`."""
        x, y = getattr(self, f"{split}_x"), getattr(self, f"{split}_y")
        return (x, y) if ids is None else (x[ids], y[ids])


def hold_out(total: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split `total` training images: return the ids kept, rising, and `n` ids held out."""
    if not 0 <= n < total:
        raise ValueError(f"val must lie in [0, {total}) for {total} training images, got {n}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[n:].sort().values, order[:n]


def numbered(*labels: Tensor) -> tuple[str, ...]:
    """Return class names for a set that has none: the numbers up to its largest label."""
    largest = max((int(y.max()) for y in labels if len(y)), default=0)
    if largest >= MAX_CLASSES:
        raise ValueError(
            f"labels must lie in [0, {MAX_CLASSES:,}), saw {largest}: number the classes from 0"
        )
    return tuple(str(i) for i in range(largest + 1))


def to_images(name: str, x: Tensor, layout: Layout | None = None) -> Tensor:
    """Convert raw pixels to float32 in [0, 1], NCHW.

    `x` is (N, H, W) grey, (N, C, H, W) or (N, H, W, C); uint8, or floating in [0, 1]. The axis of
    size 1 or 3 is the channel axis; if two axes could be, `layout` ("NCHW" or "NHWC") must say
    which, else ValueError.
    """
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout must be 'NCHW', 'NHWC' or None, got {layout!r}")
    if x.dim() == 3:
        x = x[:, None]
    elif x.dim() == 4:
        layout = layout or _guess_layout(name, tuple(x.shape))
        x = x.permute(0, 3, 1, 2) if layout == "NHWC" else x
    else:
        raise ValueError(f"{name} must be (N, H, W), NCHW or NHWC, got shape {tuple(x.shape)}")
    if x.dtype == torch.uint8:
        return x.contiguous().float().div_(255)
    if x.is_floating_point():
        return x.float().contiguous()
    raise ValueError(f"{name} must be uint8 or floating in [0, 1], got {x.dtype}")


def _guess_layout(name: str, shape: tuple[int, ...]) -> Layout:
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first != last:
        return "NCHW" if first else "NHWC"
    why = "both axis 1 and axis 3 could be" if first else "neither axis 1 nor axis 3 can be"
    raise ValueError(
        f"{name} has shape {shape}: {why} the channels (1 or 3); pass layout='NCHW' or 'NHWC'"
    )


def check_images(name: str, x: Tensor, y: Tensor, num_classes: int) -> None:
    """Raise ValueError unless (x, y) has the form that `ImageData` promises."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name} must be a non-empty (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(
            f"the labels of {name} must be int64 of shape ({len(x)},), "
            f"got {y.dtype} of shape {tuple(y.shape)}"
        )
    low, high = (v.item() for v in x.aminmax())
    if not (low >= 0 and high <= 1):  # true for NaN too
        seen = "NaN" if math.isnan(low) else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must lie in [0, 1], saw {seen}; store uint8, or divide by 255")
    low, high = (v.item() for v in y.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the labels of {name} must lie in [0, {num_classes}), saw [{low}, {high}]"
        )
