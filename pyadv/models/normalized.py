"""Input normalisation inside the model, so that attacks work in pixel units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """A module that computes `model((x - mean) / std)`; x, eps, alpha and the box stay in pixel
    units.

    Args:
        model: a module that takes normalised images.
        mean: a float or one value per channel.
        std: a positive float or one positive value per channel.

    `mean` and `std` become buffers: they follow `.to(...)` and are part of the state dict.

    Raises:
        ValueError: if a value is not finite or `std` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            values = torch.as_tensor(value, dtype=torch.float32).flatten()
            if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
                rule = "finite and positive" if name == "std" else "finite"
                raise ValueError(f"{name} must be {rule}, got {values.tolist()}")
            self.register_buffer(name, values.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)
