"""Input normalisation as part of the model, so that attacks stay in pixel units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """`model((x - mean) / std)` for x in pixel units; eps, alpha and the box keep theirs.

    `mean` and `std` are floats or one value per channel, std > 0 (ValueError). They are
    buffers: they follow `.to(...)` and stand in the checkpoint.
    """

    def __init__(
        self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32).flatten()
            if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
                rule = "finite and positive" if name == "std" else "finite"
                raise ValueError(f"{name} must be {rule}, got {value.tolist()}")
            self.register_buffer(name, value.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)
