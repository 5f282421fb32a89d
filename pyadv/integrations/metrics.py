"""Robust accuracy, accumulated over batches in the way of torchmetrics.

metric = RobustAccuracy(PGD(eps=8/255))
for x, y in loader:
    metric.update(model, x, y)
print(metric.compute())

With torchmetrics installed `RobustAccuracy` is one of its metrics; otherwise it is an `nn.Module`
with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyadv.attacks.ensemble import AttackLike
from pyadv.attacks.pgd import PGD
from pyadv.engine import predict


class _Counting(nn.Module):
    """What `RobustAccuracy` uses of `torchmetrics.Metric`."""

    robust: Tensor
    total: Tensor
    update: Callable[..., None]

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[str] = []

    def add_state(self, name: str, default: Tensor, dist_reduce_fx: str) -> None:
        self._counts.append(name)
        self.register_buffer(name, default.clone(), persistent=False)

    def reset(self) -> None:
        """Forget all batches."""
        for name in self._counts:
            setattr(self, name, torch.zeros_like(getattr(self, name)))

    def forward(self, *batch: Any) -> Tensor:
        """Add a batch, and return its own value, on this process."""
        before = {name: getattr(self, name) for name in self._counts}
        self.reset()
        self.update(*batch)
        value = self.robust / self.total
        for name, count in before.items():
            setattr(self, name, count + getattr(self, name))
        return value


if TYPE_CHECKING:
    _Base = _Counting
else:
    try:
        from torchmetrics import Metric as _Base
    except ImportError:
        _Base = _Counting


def _everywhere(metric: nn.Module, name: str) -> Tensor:
    """Return the sum of a count over the processes; torchmetrics forms it by itself."""
    count: Tensor = getattr(metric, name)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(metric, _Counting) and distributed:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return count


class RobustAccuracy(_Base):
    """The share of samples that are classified correctly both clean and under an attack.

    Random starts follow the values of the sample, so the result depends neither on the batches nor
    on the order. Over several processes the counts are summed.

    Args:
        attack: any attack of pyadv, untargeted; its own model, if it has one, is not used.
        settings: those of `torchmetrics.Metric`, where that is installed.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    clean: Tensor

    def __init__(self, attack: AttackLike, **settings: Any):
        super().__init__(**settings)
        loss = getattr(getattr(attack, "settings", None), "loss", None)
        if getattr(loss, "targeted", False):
            raise ValueError(
                "attack must be untargeted, because y holds labels, got a targeted one"
            )
        self.attack = attack
        for name in ("robust", "clean", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, model: Callable[..., Any], x: Tensor, y: Tensor) -> None:
        """Attack a batch and count: x (B, ...) in the attack's box, y (B,) int64 labels."""
        settings = getattr(self.attack, "settings", None) or PGD(lo=None, hi=None).settings
        clean = predict(model, x, settings).argmax(1) == y
        robust = clean & self.attack.run(x, y, draw=0, model=model).correct
        self.clean = self.clean + clean.sum().to(self.clean.device)
        self.robust = self.robust + robust.sum().to(self.robust.device)
        self.total = self.total + len(y)

    def compute(self) -> Tensor:
        """Return the robust accuracy of all batches, in [0, 1]; NaN before the first."""
        return _everywhere(self, "robust") / _everywhere(self, "total")

    @property
    def clean_accuracy(self) -> Tensor:
        """The clean accuracy of this process's batches."""
        return self.clean / self.total
