"""Layers of a rewritten network: folded, frozen, and with input gradients of their own.

Each layer holds the model's layers that it replaces. At `refresh` it copies their weights,
converted and laid out for speed. Parameters of the model get no gradients through these layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from pyadv import ops
from pyadv.ops.registry import has_kernel

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
NORM_AFTER: dict[type, type[_BatchNorm]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
NARROW = 4  # up to so many input channels oneDNN's input gradient is slow
# Convolutions for which Winograd's algorithm is faster than oneDNN. For each stride: the paddings
# the kernel supports, and the least number of input and of output channels.
WINOGRAD: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {
    (1, 1): ((0, 1, 2), 16),
    (2, 2): ((1,), 32),
}
WINOGRAD_SIDE = 4  # least height and width of the output
PATCH_ROWS = 32  # samples whose patches fit in the cache


class Weighted(Protocol):
    """A layer with a weight and, if it has one, a bias."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


class PlainConv(Weighted, Protocol):
    """A two-dimensional convolution that pads with zeros, by numbers; see `is_plain`."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class WeightedLayer(nn.Module):
    """A convolution, with the BatchNorm that follows it if there is one, or a linear layer.

    The model's layers are held in tuples, so that they do not become sub-modules of this one.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Conv | nn.Linear):
        super().__init__()
        self.layer = (layer,)
        self.norm: tuple[_BatchNorm, ...] = ()
        self.made: set[str] = set()  # names of the tensors below that are not the layer's own
        self.points: dict[bool, Tensor] = {}
        # Set by the rewriting. `relu`: a ReLU follows. `readers_mask`: the convolutions that read
        # the result multiply its gradient by the ReLU's mask; their `source` is this layer.
        self.relu = self.readers_mask = False
        self.source: tuple[WeightedLayer, ...] = ()
        self.out_channels = layer.weight.shape[0] if layer.weight.dim() == 4 else 0
        self.narrow = is_plain(layer) and is_narrow(layer.weight, layer.groups)
        # The layer again, if Winograd's algorithm is for convolutions of its kind.
        self.winograd: tuple[PlainConv, ...] = ()
        if is_plain(layer) and _has_window(layer):
            self.winograd = (layer,)

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        """Copy the weights that the model has now."""
        (layer,) = self.layer
        weight, bias = folded(layer, self.norm)
        if weight.dim() != 4 or not (weight.is_cpu or dtype):  # cuDNN converts float32 itself
            layout = torch.preserve_format
        if renew(self, "weight", weight, dtype or weight.dtype, layout, layer.weight):
            self.points.clear()
        renew(self, "bias", bias, self.weight.dtype, owner=layer.bias)
        self.has_points = (
            bool(self.winograd)
            and self.weight.is_cpu
            and self.weight.dtype == torch.float32
            and layout == torch.channels_last
            and has_kernel("winograd", self.weight.device)
        )

    def points_of(self, transposed: bool) -> Tensor:
        """Return the weight as Winograd's convolution reads it, computed at the first request."""
        if transposed not in self.points:
            stride = self.winograd[0].stride[0]
            self.points[transposed] = ops.winograd_weight(self.weight, transposed, stride)
        return self.points[transposed]

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if self.has_points and _has_tiles(x, added, self.winograd[0]):
            (layer,) = self.winograd
            return WinogradConv.apply(x, added, self, layer.padding[0], layer.stride[0])
        if self.source and self.source[0].has_points:
            x = torch.relu(x)  # the source's values are rectified already, its gradient is not
        y = self.convolved(x)
        y = y if added is None else y + added
        return y.relu_() if self.relu else y

    def convolved(self, x: Tensor) -> Tensor:
        """Return the layer's result without what is fused with it, computed by PyTorch."""
        (layer,) = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, self.bias)
        if self.narrow and x.is_cpu and x.requires_grad:
            return NarrowConv.apply(
                x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation
            )
        return layer._conv_forward(x, self.weight, self.bias)


class AffineLayer(nn.Module):
    """A BatchNorm that cannot be folded into a convolution: x * scale + shift."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        self.norm = (norm,)
        self.made: set[str] = set()

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        """Copy the parameters and statistics that the model has now."""
        (norm,) = self.norm
        scale, shift = scale_and_shift(*affine_of(norm))
        renew(self, "scale", scale, dtype or scale.dtype)
        renew(self, "shift", shift, dtype or shift.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


class Renewed(Protocol):
    """A layer whose tensors `renew` sets. `made` has the names of those that it has made."""

    made: set[str]


def renew(
    part: Renewed,
    name: str,
    value: Tensor | None,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.preserve_format,
    owner: Tensor | None = None,
) -> bool:
    """Set `part.name` to `value`, converted.

    The tensor stays at its address, where a CUDA graph reads it, unless it shares the memory of
    `owner`. Returns False if the values are known not to have changed, which is checked on the CPU
    only.
    """
    old = getattr(part, name, None)
    if value is None or (old is not None and old.shape != value.shape):
        old = None
    if value is not None and old is not None and name in part.made and old.device == value.device:
        if old.is_cpu and old.dtype == value.dtype and torch.equal(old, value):
            return False
        old.copy_(value)
        return True
    new = None if value is None else value.detach().to(dtype)
    if new is not None and layout != torch.preserve_format:
        new = new.contiguous(memory_format=layout)
    if new is None or owner is None or new.data_ptr() != owner.data_ptr():
        part.made.add(name)
    elif old is not None and old.data_ptr() == new.data_ptr():
        return True  # the model's own memory, whose values may have changed
    setattr(part, name, new)
    return True


class NarrowConv(torch.autograd.Function):
    """A two-dimensional convolution with few input channels and a cheap input gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size = x.shape[-2:]
        ctx.window = {"stride": stride, "padding": padding, "dilation": dilation}
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return narrow_input_gradient(grad, weight, ctx.size, **ctx.window), *(None,) * 5


def is_narrow(weight: Tensor, groups: int) -> bool:
    """Return whether `narrow_input_gradient` is faster than oneDNN for this convolution."""
    return weight.dim() == 4 and weight.shape[1] <= NARROW and groups == 1


def narrow_input_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Return the input gradient of a two-dimensional convolution with few input channels.

    It is a matrix product, which gives the gradient of each window, and a sum over the windows.

    Args:
        size: (H, W) of the convolution's input.
    """
    kernel, window = weight.detach().flatten(1).T, weight.shape[2:]
    height, width = size
    images = []
    for part in grad.detach().split(PATCH_ROWS):
        patches = kernel @ part.flatten(2)
        patches = patches.reshape(1, -1, patches.shape[2])  # `fold` sees one image, many channels
        folded = F.fold(patches, (height, width), window, dilation, padding, stride)
        images.append(folded.view(len(part), -1, *size))
    return torch.cat(images)


def is_plain(layer: nn.Module | None) -> TypeGuard[PlainConv]:
    """Return whether the layer is a two-dimensional convolution that pads with zeros, by numbers.

    Padding "same" is a string, and padding modes other than "zeros" pad in a pass before.
    """
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def is_weighted(layer: nn.Module | None) -> TypeGuard[Conv | nn.Linear]:
    """Return whether the layer is one that a `WeightedLayer` replaces."""
    return type(layer) in (*NORM_AFTER, nn.Linear)


def is_affine(layer: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """Return whether the layer is a BatchNorm that is an affine map in evaluation mode."""
    affine = isinstance(layer, _BatchNorm) and layer.running_mean is not None
    return affine and type(layer) in NORM_AFTER.values()


def _has_window(layer: PlainConv) -> bool:
    """Return whether Winograd's convolution supports the window, and has channels enough to pay."""
    paddings, least = WINOGRAD.get(layer.stride, ((), 0))
    return (
        layer.groups == 1
        and (layer.kernel_size, layer.dilation) == ((3, 3), (1, 1))
        and layer.padding in [(p, p) for p in paddings]
        and min(layer.in_channels, layer.out_channels) >= least
    )


def output_shape(x: Tensor, layer: PlainConv) -> tuple[int, ...]:
    """Return the shape of what a plain convolution computes of images x (B, C, H, W)."""
    windows = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    sides = zip(x.shape[2:], *windows, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    return (x.shape[0], layer.out_channels, *size)


def _has_tiles(x: Tensor, added: Any, layer: PlainConv) -> bool:
    """Return whether Winograd's convolution takes x, has enough output pixels to pay, and can add
    `added` without broadcasting or conversion."""
    if x.dim() != 4 or torch.is_autocast_enabled(x.device.type):
        return False
    shape = output_shape(x, layer)
    fits = added is None or (
        isinstance(added, Tensor) and added.shape == shape and added.dtype == x.dtype
    )
    return fits and min(shape[2:]) >= WINOGRAD_SIDE


class WinogradConv(torch.autograd.Function):
    """A two-dimensional 3x3 convolution, with the sum and the ReLU that are fused with it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, part: WeightedLayer, padding: int, stride: int
    ) -> Tensor:
        ctx.shape, ctx.window = x.shape, (padding, stride)
        points = part.points_of(transposed=False)
        window = (part.out_channels, padding, stride)
        y = ops.winograd_conv2d(x, points, part.bias, *window, added=added, relu=part.relu)
        if any(ctx.needs_input_grad):
            mask = x if part.source else None
            own_mask = y if part.relu and not part.readers_mask else None
            ctx.save_for_backward(part.points_of(transposed=True), mask, own_mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        points, mask, own_mask = ctx.saved_tensors
        if own_mask is not None:
            grad = torch.ops.aten.threshold_backward(grad, own_mask, 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.winograd_conv2d_input(grad, points, ctx.shape, *ctx.window, mask=mask)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None


class Holder(Protocol):
    """A layer that replaces another one and the BatchNorms that follow it."""

    norm: tuple[_BatchNorm, ...]

    @property
    def layer(self) -> tuple[Weighted]: ...


def takes(part: Holder, norm: _BatchNorm) -> bool:
    """Return whether `norm` can be folded into the layer that the part replaces."""
    return not part.norm and NORM_AFTER.get(type(part.layer[0])) is type(norm)


def folded(layer: Weighted, norms: Sequence[_BatchNorm]) -> tuple[Tensor, Tensor | None]:
    """Return the layer's weight and bias, with those of the BatchNorms that follow it."""
    weight, bias = layer.weight.detach(), layer.bias
    for norm in norms:
        scale, shift = scale_and_shift(*affine_of(norm))
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
        bias = shift if bias is None else bias * scale + shift
    return weight, bias


def affine_of(norm: _BatchNorm) -> tuple[Any, ...]:
    """Return the arguments of `scale_and_shift` for a BatchNorm."""
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), with which BatchNorm in evaluation mode is x * scale + shift."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
