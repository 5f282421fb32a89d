"""Shuffled batches whose order is a function of (seed, epoch), so that a run can resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyadv.data.seeds import mixed


def crop_and_flip(x: Tensor, offsets: Tensor, flips: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by its own offset inside a zero border, and mirror it where `flips`.

    `x` (B, C, H, W); `offsets` int64 (B, 2) in [0, 2 padding], rows and columns; `flips`
    bool (B,). The result is that of RandomCrop(padding=4) and RandomHorizontalFlip in the CIFAR
    recipes; one gather computes it for the whole batch.
    """
    b, c, h, w = x.shape
    rows = offsets[:, :1] + torch.arange(h, device=x.device)
    cols = torch.arange(w, device=x.device).expand(b, w)
    cols = offsets[:, 1:] + torch.where(flips[:, None], cols.flip(1), cols)
    padded = F.pad(x, (padding,) * 4).flatten(2)
    index = (rows[:, :, None] * (w + 2 * padding) + cols[:, None, :]).view(b, 1, h * w)
    return padded.gather(2, index.expand(b, c, h * w)).view(b, c, h, w)


_SHARE = 0.25  # share of a GPU's free memory that a training set may take


class Plan:
    """The batches of every epoch: which samples, in which order, shifted and mirrored how.

    A generator seeded with (seed, e) shuffles, crops and flips epoch e, so `epoch(e, start=s)`
    continues a run that stopped after s batches exactly. A subclass fetches the images.

    Args:
        ids: int64 indices of the samples to use.
        batch_size: samples of a batch, over all processes.
        seed: of the order and the augmentation.
        augment: crop and flip, see `crop_and_flip`, in a zero border of an eighth of the image, at
            least 4.
        device: of the batches, by default the CPU.
        rank: number of this process. It gets every `world`-th sample of each batch, so that the
            batch as a whole does not depend on the number of processes.
        world: number of processes; a last batch is cut to a multiple of it.

    Raises:
        ValueError: if `batch_size` is not a positive multiple of `world`.
    """

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool = False,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a positive multiple of {world}, got {batch_size}")
        self.device = torch.device("cpu" if device is None else device)
        self.ids, self.batch_size, self.seed, self.augment = ids, batch_size, seed, augment
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        full, rest = divmod(len(self.ids), self.batch_size)
        return full + (rest >= self.world)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches (x, y, ids) of `epoch` from number `start` on."""
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        n = len(self.ids)
        order = torch.randperm(n, generator=generator)
        shifts = torch.randint(2 * self.padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5
        order, shifts, flips = (
            order.to(self.ids.device),
            shifts.to(self.device),
            flips.to(self.device),
        )
        rows = [self._rows(step) for step in range(start, len(self))]
        batches = self.fetch(epoch, [self.ids[order[r]] for r in rows])
        for r, (x, y, ids) in zip(rows, batches, strict=True):
            if self.augment:
                x = crop_and_flip(x, shifts[r], flips[r], self.padding)
            yield x, y, ids

    def _rows(self, step: int) -> slice:
        """Return the rows of the order that this process gets in a step."""
        first, end = step * self.batch_size, min(len(self.ids), (step + 1) * self.batch_size)
        return slice(first + self.rank, end - (end - first) % self.world, self.world)

    @property
    def padding(self) -> int:
        """The border in which images are shifted."""
        return max(4, min(self.shape[1:]) // 8)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        raise NotImplementedError

    def fetch(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (x, y, ids) on the device, float32 images in [0, 1], for each tensor of ids."""
        raise NotImplementedError


class Batches(Plan):
    """Batches (x, y, ids) of a training set in memory, on `device`.

    A GPU with room for the whole set stores it from the start, so that no batch is copied to it.

    Args:
        x: images (N, C, H, W).
        y: labels (N,).
        batch_size: as for `Plan`, and so are `settings`.
        ids: int64 indices of the samples to use, by default all.

    Raises:
        ValueError: as `Plan` does, if `x` and `y` differ in length, if `ids` are not indices of
            samples.
    """

    def __init__(
        self, x: Tensor, y: Tensor, batch_size: int, *, ids: Tensor | None = None, **settings: Any
    ) -> None:
        super().__init__(torch.arange(len(x)) if ids is None else ids, batch_size, **settings)
        if len(x) != len(y):
            raise ValueError(f"x and y must be as many, got {len(x)} and {len(y)}")
        if ids is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(x):
            raise ValueError(
                f"ids must lie in [0, {len(x)}), saw [{int(ids.min())}, {int(ids.max())}]"
            )
        self.home = self.device if _has_room(self.device, x) else torch.device("cpu")
        self.x, self.y, self.ids = x.to(self.home), y.to(self.home), self.ids.to(self.home)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.x.shape
        return channels, height, width

    def fetch(self, epoch: int, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for ids in batches:
            yield self.x[ids].to(self.device), self.y[ids].to(self.device), ids.to(self.device)


def _has_room(device: torch.device, x: Tensor) -> bool:
    return device.type == "cuda" and x.nbytes <= _SHARE * torch.cuda.mem_get_info(device)[0]
