"""Models with bounds and preprocessing, and what tensors of eagerpy stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyadv.passes.borrow import borrowed, pick_logits

_KEYS = ("mean", "std", "axis", "flip_axis")


class Bounds(NamedTuple):
    """The box that inputs lie in."""

    lower: float
    upper: float


def unwrapped(value: Any) -> tuple[Any, Callable[[Tensor], Any]]:
    """Return the torch tensor in a tensor of eagerpy, and a function that wraps results again.
    Other values come back as they are."""
    raw = getattr(value, "raw", None)
    if isinstance(raw, Tensor):
        return raw, type(value)
    return value, lambda t: t


class PyTorchModel(nn.Module):
    """A model of inputs in `bounds`.

    Args:
        model: maps inputs to logits.
        bounds: (lower, upper).
        device: where to move the model; by default it stays where it is.
        preprocessing: what happens to inputs before the model: "mean" and "std" (numbers, arrays or
            tensors; with a negative "axis" one value per entry of that axis), and "flip_axis".
    """

    data_format = "channels_first"
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        bounds: tuple[float, float],
        device: str | torch.device | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        given = dict(preprocessing or {})
        unknown = given.keys() - set(_KEYS)
        if unknown:
            raise ValueError(f"preprocessing must have keys of {_KEYS}, got {sorted(unknown)}")
        if model.training:
            warnings.warn(
                "the model is in training mode; attacks run in evaluation mode, and calls of this "
                "object in training mode",
                stacklevel=2,
            )
        self.model = model if device is None else model.to(device)
        self.bounds = Bounds(*bounds)
        self.flip_axis = given.get("flip_axis")
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        for name in ("mean", "std"):
            value = _values(name, given.get(name), given.get("axis"))
            self.register_buffer(name, None if value is None else value.to(place))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def forward(self, inputs: Any) -> Any:
        """Return the model's output for inputs in `bounds`."""
        x, wrap = unwrapped(inputs)
        if self.flip_axis is not None:
            x = x.flip(self.flip_axis)
        x = x if self.mean is None else x - self.mean.to(x.dtype)
        x = x if self.std is None else x / self.std.to(x.dtype)
        output = self.model(x)
        return wrap(output) if isinstance(output, Tensor) else output

    def transform_bounds(self, bounds: tuple[float, float]) -> PyTorchModel:
        """Return the same model for inputs in other bounds."""
        (a, b), (c, d) = self.bounds, bounds
        factor = (d - c) / (b - a)
        other = PyTorchModel(self.model, bounds)
        other.flip_axis = self.flip_axis
        mean = torch.zeros(1, device=self.device) if self.mean is None else self.mean
        std = torch.ones(1, device=self.device) if self.std is None else self.std
        other.mean, other.std = factor * (mean - a) + c, factor * std
        return other


def _values(name: str, given: Any, axis: int | None) -> Tensor | None:
    if given is None:
        return None
    value = torch.as_tensor(unwrapped(given)[0])
    value = value if value.is_floating_point() else value.float()
    if axis is None:
        return value
    if axis >= 0 or value.dim() != 1:
        raise ValueError(
            f"preprocessing: axis must be negative and {name} have one dimension, got axis={axis} "
            f"and shape {list(value.shape)}"
        )
    return value.reshape(-1, *(1,) * (-axis - 1))


def accuracy(fmodel: PyTorchModel, inputs: Any, labels: Any) -> float:
    """Return the share of inputs that the model, in evaluation mode, classifies as `labels`."""
    x, y = unwrapped(inputs)[0], unwrapped(labels)[0]
    with torch.no_grad(), borrowed(fmodel):
        predicted = pick_logits(fmodel(x), None).argmax(1)
    return (predicted == y).float().mean().item()
