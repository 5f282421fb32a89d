"""Second derivatives of piecewise linear networks, at the price of first ones.

The input gradient of such a network is g = W_1^T D_1 W_2^T ... c, where the masks D are constants.
The derivative of ||g||^2 with respect to the weights takes one more forward pass, of the tangent g,
and for each layer a product of that pass with the gradients from which g was computed. Autograd
does more: it carries the zero derivatives of the masks back through the network, and it computes
the weight gradient of a convolution as a convolution with the batch as channels, which is several
times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from pyadv.passes.layers import is_narrow, narrow_input_gradient, scale_and_shift

aten = torch.ops.aten
_PLAIN = (Tensor, nn.Parameter)  # subclasses bring their own rules


class TangentSweep(TorchFunctionMode):
    """A context in which second derivatives of a model cost less.

    A model that runs inside computes the same values and the same first and second derivatives as
    outside. Convolutions, BatchNorm in evaluation mode, linear layers, (leaky) ReLUs and pooling
    are replaced; other operations are left to autograd. Third derivatives raise an error.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        if rule and (any(t not in _PLAIN for t in types) or _saves_elsewhere()):
            rule = None
        return (rule or func)(*args, **(kwargs or {}))


def _saves_elsewhere() -> bool:
    """Return whether hooks decide how tensors are saved for the backward pass.

    Checkpointing uses such hooks; it runs its part of the model again after the sweep has ended.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _conv(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = weight.dim() - 2
    if isinstance(padding, str) or input.dim() != n + 2:
        return function(input, weight, bias, stride, padding, dilation, groups)
    input, weight = _autocast(input), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    window = [(s,) * n if isinstance(s, int) else tuple(s) for s in (stride, padding, dilation)]
    settings = (*window, False, (0,) * n, groups)  # not transposed
    carrier = _WeightGradient.apply(weight, bias, (input,), settings)
    return _Conv.apply(input, weight, bias, carrier, settings)


class _Conv(torch.autograd.Function):
    """A convolution whose weight gradient is a node apart.

    The gradient of the weights runs through `carrier`, a tensor of zeros. Autograd skips that node
    where only the input's gradient is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        carrier: Tensor,
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return aten.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _InputGradient.apply(grad, weight, x.detach(), ctx.settings), None, None, grad, None


class _InputGradient(torch.autograd.Function):
    """The input gradient of a convolution, whose derivative is a convolution of the tangent."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.settings = settings
        stride, padding, dilation, *_, groups = settings
        if x.is_cpu and is_narrow(weight, groups):
            return narrow_input_gradient(grad, weight, x.shape[2:], stride, padding, dilation)
        return aten.convolution_backward(grad, x, weight, None, *settings, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        of_grad = of_weight = None
        if ctx.needs_input_grad[0]:
            of_grad = aten.convolution(tangent, weight, None, *ctx.settings)
        if ctx.needs_input_grad[1]:
            only = [False, True, False]
            backward = aten.convolution_backward
            of_weight = backward(grad, tangent, weight, None, *ctx.settings, only)[1]
        return of_grad, of_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """Zeros of the shape of a convolution's result; its backward pass computes the weight gradient.

    The convolution's input comes in a tuple, so that the node has no edge to the layers before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        inputs: tuple[Tensor],
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        (ctx.x,), ctx.settings = inputs, settings
        ctx.bias_size = None if bias is None else list(bias.shape)
        sides = zip(ctx.x.shape[2:], weight.shape[2:], *settings[:3], strict=True)
        result = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides]
        return weight.new_zeros(()).expand(len(ctx.x), len(weight), *result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), size = ctx.saved_tensors, ctx.bias_size
        asked = [False, *ctx.needs_input_grad[:2]]
        grads = aten.convolution_backward(grad, ctx.x, weight, size, *ctx.settings, asked)
        return *grads[1:], None, None


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or running_mean.dtype != input.dtype:
        statistics = (running_mean, running_var)
        return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
    shape = (-1, *(1,) * (input.dim() - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _Rectifier.apply(input, None, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if negative_slope < 0:  # the sign of the input cannot be read off the result
        return F.leaky_relu(input, negative_slope, inplace)
    return _Rectifier.apply(input, negative_slope, inplace)


class _Rectifier(torch.autograd.Function):
    """A ReLU or leaky ReLU whose mask is a constant in second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float | None, inplace: bool) -> Tensor:
        y = F.relu(x, inplace) if slope is None else F.leaky_relu(x, slope, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y = ctx.saved_tensors[0].detach()
        if ctx.slope is None:
            return aten.threshold_backward(grad, y, 0), None, None
        return aten.leaky_relu_backward(grad, y, ctx.slope, True), None, None


def _pool(function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Pool.apply(input, lambda x: function(x, *args, **kwargs))


class _Pool(torch.autograd.Function):
    """A piecewise linear function of its input, such as pooling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.result = function(ctx.leaf)
        return ctx.result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        more = {"retain_graph": True, "create_graph": torch.is_grad_enabled()}
        return *torch.autograd.grad(ctx.result, ctx.leaf, grad, **more), None


def _autocast(t: Tensor) -> Tensor:
    """Return t as autocast would cast it: autocast does not see into an autograd.Function."""
    kind = t.device.type
    if not torch.is_autocast_enabled(kind) or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(kind))


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_POOLS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
)
_RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **{f: partial(_conv, f) for f in _CONVOLUTIONS},
    **{f: partial(_pool, f) for f in _POOLS},
    F.batch_norm: _batch_norm,
    F.leaky_relu: _leaky_relu,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(_relu, inplace=True)),
}
