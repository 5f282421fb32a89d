"""Second derivatives at the price of first ones.

A network that is linear in pieces has an input gradient g = W_1^T D_1 W_2^T ... c, where the masks
D are constants. Its derivative with respect to the weights needs the tangent of g, one more pass
forward, and an outer product a layer with the cotangents that made g. Autograd's formulas do more:
they carry the zero derivatives of the masks back through the network, and make a convolution's
weight gradient by a convolution with the batch as its channels, which is several times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from pyadv.passes.layers import is_narrow, narrow_input_gradient, scale_and_shift

aten = torch.ops.aten
_PLAIN = (Tensor, nn.Parameter)  # other classes have rules of their own


class TangentSweep(TorchFunctionMode):
    """A model that runs inside it computes what it does outside, and has the same gradients of
    first and second order. Second ones cost less where it is made of convolutions, BatchNorm in
    evaluation mode, linear layers, (leaky) ReLUs and pooling; other operations have autograd's.
    Third ones are refused.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = _RULES.get(func)
        if rule and (any(t not in _PLAIN for t in types) or _saves_elsewhere()):
            rule = None
        return (rule or func)(*args, **(kwargs or {}))


def _saves_elsewhere() -> bool:
    """Whether what the backward pass needs is kept in a way of the user's: checkpointing, which
    runs its part of the model again, after the sweep."""
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
    input, weight, bias = (_autocast(t) for t in (input, weight, bias))
    window = [(s,) * n if isinstance(s, int) else tuple(s) for s in (stride, padding, dilation)]
    settings = (*window, False, (0,) * n, groups)  # not transposed
    carrier = _WeightGradient.apply(weight, bias, (input,), settings)
    return _Conv.apply(input, weight, bias, carrier, settings)


class _Conv(torch.autograd.Function):
    """A convolution. The gradient of its weights runs through `carrier`, a zero, in a node of its
    own, which autograd leaves out where only the input's gradient is asked for."""

    @staticmethod
    def forward(ctx, x, weight, bias, carrier, settings):
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return aten.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return _InputGradient.apply(grad, weight, x.detach(), ctx.settings), None, None, grad, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, x, settings):
        ctx.save_for_backward(grad, weight)
        ctx.settings = settings
        stride, padding, dilation, *_, groups = settings
        if x.is_cpu and is_narrow(weight, groups):
            return narrow_input_gradient(grad, weight, x.shape[2:], stride, padding, dilation)
        return aten.convolution_backward(grad, x, weight, None, *settings, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, tangent):
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
    """A zero of the shape of a convolution's result; backward, the gradients of its weights. In a
    tuple, its input gives the node no edge to the layers before."""

    @staticmethod
    def forward(ctx, weight, bias, inputs, settings):
        ctx.save_for_backward(weight)
        (ctx.x,), ctx.settings = inputs, settings
        ctx.bias_size = None if bias is None else list(bias.shape)
        sides = zip(ctx.x.shape[2:], weight.shape[2:], *settings[:3], strict=True)
        result = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides]
        return weight.new_zeros(()).expand(len(ctx.x), len(weight), *result)

    @staticmethod
    def backward(ctx, grad):
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
    if training or running_mean is None or running_mean.dtype != input.dtype:
        statistics = (running_mean, running_var)
        return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    scale, shift = scale_and_shift(running_mean, running_var, weight, bias, eps)
    shape = (-1, *(1,) * (input.dim() - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _Rectifier.apply(input, None, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if negative_slope < 0:  # the result does not tell the sign of the input
        return F.leaky_relu(input, negative_slope, inplace)
    return _Rectifier.apply(input, negative_slope, inplace)


class _Rectifier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope, inplace):
        y = F.relu(x, inplace) if slope is None else F.leaky_relu(x, slope, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx, grad):
        y = ctx.saved_tensors[0].detach()
        if ctx.slope is None:
            return aten.threshold_backward(grad, y, 0), None, None
        return aten.leaky_relu_backward(grad, y, ctx.slope, True), None, None


def _pool(function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Pool.apply(input, lambda x: function(x, *args, **kwargs))


class _Pool(torch.autograd.Function):
    """A function with a derivative that its input changes in jumps only."""

    @staticmethod
    def forward(ctx, x, function):
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.result = function(ctx.leaf)
        return ctx.result.detach()

    @staticmethod
    def backward(ctx, grad):
        more = {"retain_graph": True, "create_graph": torch.is_grad_enabled()}
        return *torch.autograd.grad(ctx.result, ctx.leaf, grad, **more), None


def _autocast(t: Tensor | None) -> Tensor | None:
    """As autocast would have it, which does not see into a function of ours."""
    kind = None if t is None else t.device.type
    if kind is None or not torch.is_autocast_enabled(kind) or t.dtype == torch.float64:
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
