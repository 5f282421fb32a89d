"""The samples of an evaluation, in the forms that data come in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pyadv.engine import checks

Batches = Iterable[Any]  # (x, y), or a dict with one entry of each
_FORMS = "a tensor with y, batches (x, y) of tensors, or a Dataset of samples (x, label)"


def chunks(
    data: Tensor | np.ndarray | Batches | Dataset[Any],
    y: Tensor | np.ndarray | Sequence[int] | None,
    size: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the samples in chunks of at least `size`, the last one excepted; a tensor is one chunk.

    Args:
        data, y: as in `evaluate`.
        batch_size: samples read at a time from a Dataset.

    Raises:
        ValueError, TypeError: for data in another form, with the rule and what was seen.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        x = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
        labels = y if y is None else _labels(y)
        if labels is None or x.dim() == 0 or len(x) == 0 or labels.shape != x.shape[:1]:
            n = len(x) if x.dim() else 0
            raise ValueError(
                f"y must be (N,) for N = {n} >= 1 samples of data, got "
                f"{None if labels is None else list(labels.shape)}"
            )
        yield x, labels
        return
    if y is not None:
        raise ValueError("y belongs to data given as a tensor; batches carry their labels")
    if size < 1:
        raise ValueError(f"chunk must be >= 1, got {size}")
    if isinstance(data, (str, bytes, Mapping)) or not (
        isinstance(data, Dataset) or hasattr(data, "__iter__")
    ):
        raise TypeError(f"data must be {_FORMS}, got {_seen(data)}")
    held: list[tuple[Tensor, Tensor]] = []
    for batch in _loaded(data, batch_size):
        held.append(_pair(batch))
        if sum(len(labels) for _, labels in held) >= size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _loaded(data: Batches | Dataset[Any], batch_size: int) -> Iterable[Any]:
    """Return the batches of a Dataset; other data is batches already."""
    if not isinstance(data, Dataset):
        return data
    return DataLoader(data, batch_size=batch_size, collate_fn=_collated)


def _collated(samples: list[Any]) -> Any:
    """Return the batch of some samples of a Dataset."""
    first = samples[0]
    parts = list(first.values()) if isinstance(first, Mapping) else first
    images = [p for p in parts if isinstance(p, (Tensor, np.ndarray))] if _several(parts) else []
    if not images:
        raise TypeError(
            "data must be a Dataset of samples (x, label) with a tensor x, got samples "
            f"{_seen(first)}; give it a transform that makes tensors, such as ToTensor"
        )
    return default_collate(samples)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return x and y of a batch."""
    if isinstance(batch, Mapping):
        tensors = {name: part for name, part in batch.items() if isinstance(part, Tensor)}
        images = [n for n, t in tensors.items() if t.is_floating_point() and t.dim() > 1]
        labels = [n for n, t in tensors.items() if not t.is_floating_point() and t.dim() == 1]
        if len(images) != 1 or len(labels) != 1:
            raise TypeError(
                "data must give batches as dicts with one floating tensor (B, ...), the images, "
                f"and one integer tensor (B,), the labels, got {_seen(batch)}"
            )
        batch = batch[images[0]], batch[labels[0]]
    pair = isinstance(batch, (tuple, list)) and len(batch) >= 2
    if not pair or not all(isinstance(part, Tensor) for part in batch[:2]):
        raise TypeError(f"data must be {_FORMS}, got batches {_seen(batch)}")
    x, y = batch[0], _labels(batch[1])
    checks.batch(x, y, None)
    return x, y


def _labels(y: Any) -> Tensor:
    """Return integer labels as an int64 tensor."""
    if isinstance(y, (list, tuple, np.ndarray)):
        try:
            y = torch.as_tensor(y)
        except (ValueError, TypeError, RuntimeError) as error:
            raise TypeError(f"y must be integer labels (N,), got {_seen(y)}: {error}") from None
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be an int64 tensor, got {type(y).__name__}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must be an int64 tensor, got {y.dtype}")
    return y.long()


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)


def _several(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _seen(value: Any) -> str:
    """Return the kind of a value in words, with those of its parts."""
    if isinstance(value, Mapping):
        parts = ", ".join(f"{name!r}: {_kind(part)}" for name, part in value.items())
        return f"{{{parts}}}"
    if _several(value):
        return f"({', '.join(map(_kind, value))})"
    return _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
