"""Layers of a rewritten network for a GPU: in one dtype and in channels-last order throughout.

A convolution, its bias, a residual sum and a ReLU are one call of the device's library. What lies
between two convolutions in the backward pass, the mask of a ReLU and the sum of the gradients of
two readers, is one call of `ops.affine_relu_backward`. So autograd adds nothing up: a layer whose
result has two readers returns it twice, and is given both gradients.

A layer converts what it is given if the dtype or the order differs, so that layers of unknown
kinds may lie between. Like those of `layers`, layers copy the model's weights at `refresh` and
give no gradients to its parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from pyadv import ops
from pyadv.passes.layers import (
    PlainConv,
    affine_of,
    folded,
    output_shape,
    renew,
    scale_and_shift,
)

_LOG = logging.getLogger("pyadv")
_LAST = torch.channels_last
_FUSED_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Convolutions:
    """The convolutions of a device that include a bias, a residual sum and a ReLU.

    Args:
        relu: a function with the arguments of `aten::cudnn_convolution_relu`.
        add_relu: a function with the arguments of `aten::cudnn_convolution_add_relu`.
    """

    relu: Callable[..., Tensor]
    add_relu: Callable[..., Tensor]


def _plain_relu(x: Tensor, weight: Tensor, bias: Tensor, *window: Any) -> Tensor:
    return F.conv2d(x, weight, bias, *window).relu_()


def _plain_add_relu(
    x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *window: Any
) -> Tensor:
    return F.conv2d(x, weight, bias, *window).add_(z, alpha=alpha).relu_()


CUDNN = Convolutions(
    torch.ops.aten.cudnn_convolution_relu.default, torch.ops.aten.cudnn_convolution_add_relu.default
)
# The same by functions of PyTorch that every device has. Tests and benchmarks put it into
# `CONVOLUTIONS` for the CPU, to run there what runs on a GPU.
STAND_IN = Convolutions(_plain_relu, _plain_add_relu)
# The devices whose networks are rewritten in this way.
CONVOLUTIONS: dict[str, Convolutions] = {} if torch.version.hip else {"cuda": CUDNN}


class FusedConv(nn.Module):
    """A two-dimensional convolution with what follows it: BatchNorm, a residual sum, a ReLU.

    The rewriting sets:

    - `slope`: None, or the slope below zero of the ReLU that follows;
    - `readers`: 2 if the result is returned twice, so that two gradients come back;
    - `gives_bias`: whether the layer to which the result is added adds this layer's bias, too;
    - `takes_bias`: the layer whose bias this one adds to its own, if there is one.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: PlainConv, convolutions: Convolutions):
        super().__init__()
        self.layer = (layer,)
        self.norm: tuple[_BatchNorm, ...] = ()
        self.made: set[str] = set()
        self.convolutions: Convolutions | None = convolutions
        self.slope: float | None = None
        self.readers = 1
        self.gives_bias = False
        self.takes_bias: tuple[FusedConv, ...] = ()
        self.out_channels = layer.out_channels
        self.window = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        """Copy the weights that the model has now."""
        (layer,) = self.layer
        weight, bias = folded(layer, self.norm)
        renew(self, "weight", weight, dtype or weight.dtype, _LAST, layer.weight)
        for other in self.takes_bias:
            theirs = folded(other.layer[0], other.norm)[1]
            if theirs is not None:
                bias = theirs.clone() if bias is None else bias + theirs
        if self.gives_bias:
            bias = None
        elif bias is None and self.slope is not None:
            bias = weight.new_zeros(self.out_channels)  # cuDNN's function would make it each time
        renew(self, "bias", bias, self.weight.dtype, owner=layer.bias)
        # The bias as `ops.affine_relu` takes it. Converting it at each step would be one more call.
        renew(self, "shift", bias, _wide(self.weight.dtype), owner=layer.bias)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Any:
        x = entered(x, self.weight.dtype)
        if added is None:
            return _Conv.apply(x, None, self)
        added = entered(added, self.weight.dtype)
        if added.shape != output_shape(x, self.layer[0]):  # is broadcast
            y = F.conv2d(x, self.weight, self.bias, *self.window) + added
            y = y if self.slope is None else F.leaky_relu(y, self.slope)
            return (y,) * self.readers if self.readers > 1 else y
        return _Conv.apply(x, added, self)

    def computed(self, x: Tensor, added: Tensor | None) -> Tensor:
        """Return the layer's result, in one call where the device's library has it."""
        if self.slope is None:
            return F.conv2d(x, self.weight, self.bias, *self.window)
        library = self._library()
        if library is not None:
            try:
                if added is None:
                    return library.relu(x, self.weight, self.bias, *self.window)
                return library.add_relu(x, self.weight, added, 1.0, self.bias, *self.window)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # it has no kernel for this shape or dtype
                self.convolutions = None
                _LOG.info("a convolution and its ReLU are computed apart: %s", error)
        y = F.conv2d(x, self.weight, None, *self.window)
        return ops.affine_relu(y, None, self.shift, added=added, slope=self.slope)

    def _library(self) -> Convolutions | None:
        """Return the library's fused functions, or None where they do not apply. They are not
        guaranteed to be deterministic, so they are not used where the user asks for that."""
        applies = (
            self.convolutions is not None
            and self.slope == 0
            and self.weight.dtype in _FUSED_TYPES
            and torch.backends.cudnn.enabled
            and not torch.backends.cudnn.deterministic
            and not torch.are_deterministic_algorithms_enabled()
        )
        return self.convolutions if applies else None


class _Conv(torch.autograd.Function):
    """A `FusedConv`. The input gradient is one call, and the mask before it is one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, part: FusedConv
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y = part.computed(x, added)
        ctx.window, ctx.slope = part.window, part.slope
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, part.weight, y if part.slope is not None else None)
        return y if part.readers == 1 else (y, y.detach())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, other: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        grad, other = (other, None) if grad is None else (grad, other)
        if grad is None:
            return None, None, None
        if y is not None:
            grad = ops.affine_relu_backward(y, grad, other, slope=ctx.slope)
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.window
            window = (stride, padding, dilation, False, (0, 0), groups)
            needed = (True, False, False)
            grad_x = torch.ops.aten.convolution_backward(grad, x, weight, None, *window, needed)[0]
        return grad_x, grad if ctx.needs_input_grad[1] else None, None


class FusedAffine(nn.Module):
    """A BatchNorm that cannot be folded into a convolution, with the residual sum before it and the
    ReLU after it; or, without a BatchNorm, a residual sum and a ReLU.

    The rewriting sets `slope` (1: no ReLU), `readers` as in `FusedConv`, and `passes_on`: whether
    what the BatchNorm reads is returned, too, last, for others that read it.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, norm: _BatchNorm | None):
        super().__init__()
        self.norm = () if norm is None else (norm,)
        self.made: set[str] = set()
        self.slope = 1.0
        self.readers = 1
        self.passes_on = False
        self.scale = self.shift = None
        self.dtype: torch.dtype | None = None

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        """Copy the parameters and statistics that the model has now."""
        self.dtype = dtype
        for norm in self.norm:
            scale, shift = scale_and_shift(*affine_of(norm))
            self.dtype = dtype or scale.dtype
            renew(self, "scale", scale, _wide(self.dtype))
            renew(self, "shift", shift, _wide(self.dtype))

    def forward(self, x: Tensor, added: Tensor | None = None) -> Any:
        dtype = self.dtype or x.dtype
        x, added = entered(x, dtype), None if added is None else entered(added, dtype)
        if added is not None and added.shape != x.shape:  # is broadcast
            x, added = x + added, None
        return _Affine.apply(x, added, self)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, part: FusedAffine
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.slope, ctx.readers = part.slope, part.readers
        keep = part.passes_on and added is not None
        channels = (part.scale, part.shift)
        found = ops.affine_relu(x, *channels, added=added, slope=part.slope, keep_sum=keep)
        y, passed = found if isinstance(found, tuple) else (found, x)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(y, part.scale)
        results = [y]
        if part.readers > 1:
            results.append(y.detach())
        if part.passes_on:
            results.append(passed if keep else passed.detach())
        return tuple(results) if len(results) > 1 else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, scale = ctx.saved_tensors
        given = [g for g in grads[: ctx.readers] if g is not None]
        (passed,) = grads[ctx.readers :] or (None,)
        grad = passed
        if given:
            first, *second = given
            other = second[0] if second else None
            grad = ops.affine_relu_backward(
                y, first, other, added=passed, scale=scale, slope=ctx.slope
            )
        return *(grad if needed else None for needed in ctx.needs_input_grad[:2]), None


class FusedLinear(nn.Module):
    """A linear layer with the ReLU that follows it, and with the `flatten` before it.

    `flatten` numbers the values of an image in the order (C, H, W). In memory it is (H, W, C). So
    the columns of the weight are permuted instead, and the image stays where it is.
    """

    weight: Tensor
    bias: Tensor | None
    permuted: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = (layer,)
        self.made: set[str] = set()
        self.slope: float | None = None
        self.readers = 1
        self.flattens = False
        self.image: tuple[int, ...] | None = None  # (C, H, W), once one has been seen

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        """Copy the weights that the model has now."""
        (layer,) = self.layer
        renew(
            self, "weight", layer.weight.detach(), dtype or layer.weight.dtype, owner=layer.weight
        )
        bias: Tensor | None = layer.bias
        if bias is None and self.slope == 0:
            bias = self.weight.new_zeros(len(self.weight))
        renew(self, "bias", bias, self.weight.dtype, owner=layer.bias)
        if self.image is not None:
            self._permute(self.image)

    @torch.no_grad()
    def _permute(self, image: tuple[int, ...]) -> None:
        columns = self.weight.view(-1, *image).permute(0, 2, 3, 1).flatten(1)
        # An image of one pixel leaves the columns where they are, in the memory of the weight.
        renew(self, "permuted", columns, self.weight.dtype, owner=self.weight)

    def forward(self, x: Tensor) -> Any:
        x, weight = entered(x, self.weight.dtype), self.weight
        if self.flattens and x.dim() == 4:
            if self.image != x.shape[1:]:
                self.image = tuple(x.shape[1:])
                self._permute(self.image)
            x, weight = x.permute(0, 2, 3, 1).flatten(1), self.permuted
        elif self.flattens:
            x = x.flatten(1)
        if self.slope is None:
            return F.linear(x, weight, self.bias)
        if self.slope or x.dim() != 2:
            y = F.leaky_relu(F.linear(x, weight, self.bias), self.slope)
            return (y,) * self.readers if self.readers > 1 else y
        return _LinearRelu.apply(x, weight, self.bias, self.readers)


class _LinearRelu(torch.autograd.Function):
    """A linear layer and its ReLU, one call on a GPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, readers: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(weight, y)
        return y if readers == 1 else (y, y.detach())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, other: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        weight, y = ctx.saved_tensors
        grad, other = (other, None) if grad is None else (grad, other)
        if grad is None:
            return None, None, None, None
        return ops.affine_relu_backward(y, grad, other) @ weight, None, None, None


def pooled(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    """Return the mean over these dimensions, which are height and width if x is images."""
    if x.dim() != 4:
        return x.mean(dims, keepdim=keepdim)
    return _Pool.apply(x, keepdim)


class _Pool(torch.autograd.Function):
    """The mean over the pixels, whose gradient is laid out as the pixels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keepdim: bool) -> Tensor:
        ctx.save_for_backward(x)
        return x.mean((2, 3), keepdim=keepdim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        grad = grad.reshape(*x.shape[:2], 1, 1).expand_as(x)
        return torch.div(grad, x.shape[2] * x.shape[3], out=out), None


def entered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this dtype and, if it is images, in channels-last order; x itself if it is."""
    if x.dtype == dtype and (x.dim() != 4 or x.is_contiguous(memory_format=_LAST)):
        return x
    return _Enter.apply(x, dtype)


class _Enter(torch.autograd.Function):
    """A conversion in one pass, whose gradient is converted back in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.last = x.dtype, x.dim() == 4 and x.is_contiguous(memory_format=_LAST)
        return x.to(dtype, memory_format=_LAST if x.dim() == 4 else torch.preserve_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout = _LAST if ctx.last else torch.contiguous_format
        return grad.to(ctx.dtype, memory_format=layout), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the ops compute, and take values per channel."""
    return torch.float64 if dtype == torch.float64 else torch.float32
