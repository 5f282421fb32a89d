"""Upper bounds on how fast a network's logits change with its input, for certificates.

Power iteration, and with it `ops.NormProduct`, approaches a layer's norm from below. Here every
number is an upper bound. That takes a chain of known modules, whose Lipschitz constants multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from pyadv.models.normalized import Normalized
from pyadv.passes.borrow import borrowed, uncompiled

_M = TypeVar("_M", bound=nn.Module)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Normalization = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_MaxPool = nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d
_AvgPool = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d

_ROUNDING = 1 + 1e-9  # far above the rounding error of a layer's norm in float64
_DIRECT = "donot_use_mm_for_euclid_dist"  # avoids cancellation
_CHUNK = 2**22  # complex numbers of a convolution's transform held at a time


class NotCovered(ValueError):
    """Raised for a model that `lipschitz_bound` knows no bound for."""


@dataclass(frozen=True)
class LipschitzBound:
    """Upper bounds on Lipschitz constants from L2 to L2.

    If the last layer is linear, `head` (C, n) is its weight and `body` bounds the layers before it.
    Otherwise `head` is None and `body` bounds the logits.
    """

    body: float
    head: Tensor | None

    @property
    def logits(self) -> float:
        """An upper bound on the Lipschitz constant of the logits."""
        return self.body if self.head is None else self.body * _largest_singular_value(self.head)

    def certified_radius(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return (B,) float64: within this L2 distance of an input with these logits (B, C), every
        point is classified as y. It is 0 where the input itself is not.

        min_j (z_y - z_j) / L_yj, where L_yj bounds the difference of the two logits: ||w_y - w_j||
        times the bound of the body, or sqrt(2) times that of the logits (Tsuzuku et al. 2018,
        sections 4.1 and 4.2). It holds in exact arithmetic: the rounding error of the network's
        forward pass is not bounded.
        """
        z = logits.double()
        gap = z.gather(1, y[:, None]) - z
        if self.head is None:
            bound = torch.full_like(z, math.sqrt(2) * self.body)
        else:
            head = self.head.to(z)
            bound = self.body * _ROUNDING * torch.cdist(head[y], head, compute_mode=_DIRECT)
        # If two logits cannot move apart, 0 / 0 is a tie, which gives no certificate.
        radius = (gap / bound).nan_to_num(nan=0.0, posinf=torch.inf)
        return radius.scatter(1, y[:, None], torch.inf).amin(1).clamp(min=0)


def lipschitz_bound(model: nn.Module, input_shape: Sequence[int]) -> LipschitzBound:
    """Return an upper bound on the Lipschitz constant of `model` in eval mode, from L2 to L2.

    The bound is the product over a chain: `nn.Sequential`, nested and inside `Normalized`, of
    linear layers, convolutions with zero padding, batch normalisation, pooling and activations. A
    linear layer contributes its largest singular value. A convolution contributes that of the
    periodic convolution on the smallest torus that its padded input fits into, of which it is a
    part; the two differ little. Both come from eigenvalues in float64, without iteration.

    Args:
        model: the network, which is not changed. Its weights are read once; later changes of them
            do not change the bound.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        NotCovered: for a module that is not on the list or has no bound, with its name.

    Sources: Tsuzuku et al., "Lipschitz-Margin Training" (NeurIPS 2018); Sedghi, Gupta and Long,
    "The Singular Values of Convolutional Layers" (ICLR 2019), for the periodic convolution.
    """
    network = uncompiled(model)
    if not isinstance(network, nn.Module):
        raise NotCovered(f"lipschitz_bound: {type(network).__name__} is no nn.Module")
    none = torch.empty(0, device="cpu")
    parameter = next((p for p in network.parameters() if p.is_floating_point()), none)
    x, body = parameter.new_zeros((1, *input_shape)), 1.0
    head: Tensor | None = None
    with torch.inference_mode(False), torch.no_grad(), borrowed(network):
        for name, module in _chain(network, ""):
            if head is not None:
                body *= _largest_singular_value(head)
            head = None
            if _is(module, nn.Linear):
                head = module.weight.detach().double()
            else:
                body *= _constant(name, module, x)
            if not _is(module, Normalized):  # its inner modules follow in the chain
                x = module(x)
    return LipschitzBound(body, head)


def _is(module: nn.Module, kind: type[_M]) -> TypeGuard[_M]:
    """Return whether the module has the forward of `kind`; a subclass may have another."""
    return type(module).forward is kind.forward


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are applied one after the other, with their names."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotCovered(f"lipschitz_bound: {name or 'the model'} has forward hooks")
    if _is(module, nn.Sequential):
        # named_children omits repeated modules
        for child, inside in zip(module._modules, module, strict=True):
            yield from _chain(inside, f"{name}.{child}".lstrip("."))
    else:
        yield name, module
        if _is(module, Normalized):
            yield from _chain(module.model, f"{name}.model".lstrip("."))


def _constant(name: str, module: nn.Module, x: Tensor) -> float:
    """Return the Lipschitz constant of one module on inputs like x."""
    bound = _BOUNDS.get(type(module).forward)
    value = None if bound is None else bound(module, x)
    if value is None:
        kind = type(module).__name__
        raise NotCovered(f"lipschitz_bound: no bound is known for {name or 'the model'} ({kind})")
    return value * _ROUNDING


def _convolution(layer: _Convolution, x: Tensor) -> float | None:
    """Return the largest singular value over the frequencies of the torus.

    With stride s, s input frequencies per dimension are aliased to each output frequency; the
    matrix of an output frequency holds the kernel's transforms at all of them, divided by sqrt(s).
    """
    if layer.padding_mode != "zeros":
        return None
    k, s, d, padding = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    padded: list[int]
    if padding == "same":
        padded = [a * (b - 1) for a, b in zip(d, k, strict=True)]
    elif isinstance(padding, str):  # "valid"
        padded = [0] * len(k)
    else:
        padded = [2 * p for p in padding]
    sizes = zip(x.shape[-len(k) :], padded, s, strict=True)
    outputs = [math.ceil((size + more) / stride) for size, more, stride in sizes]

    def grid(counts: Sequence[int]) -> Tensor:
        axes = (torch.arange(c, dtype=torch.float64, device=x.device) for c in counts)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    n, stride, dilation = (grid([1]).new_tensor(v) for v in (outputs, s, d))
    # The other half of the frequencies gives the complex conjugates.
    frequencies, aliases = grid([*outputs[:-1], outputs[-1] // 2 + 1]), grid(s)
    kernel = layer.weight.detach().flatten(2).unflatten(0, (layer.groups, -1)).to(torch.complex128)
    largest = 0.0
    for part in frequencies.split(max(_CHUNK // (kernel[..., 0].numel() * len(aliases)), 1)):
        turns = ((part[:, None] + n * aliases) / (n * stride)) @ (grid(k) * dilation).T
        waves = torch.exp(-2j * math.pi * turns) / math.sqrt(math.prod(s))
        transforms = torch.einsum("goit,fmt->fgoim", kernel, waves).flatten(-2)
        largest = max(largest, _largest_singular_value(transforms))
    return largest


def _largest_singular_value(matrices: Tensor) -> float:
    """Return an upper bound on the largest singular value in a batch of float64 matrices."""
    if not matrices.numel():
        return 0.0
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    return math.sqrt(torch.linalg.eigvalsh(matrices @ matrices.mH).max()) * _ROUNDING


def _normalization(layer: _Normalization, x: Tensor) -> float | None:
    """Return the constant of batch normalisation with running statistics."""
    if layer.running_var is None:
        return None
    slope = (layer.running_var.double() + layer.eps).rsqrt()
    return (slope if layer.weight is None else slope * layer.weight).abs().max().item()


def _pool(layer: _MaxPool | _AvgPool, x: Tensor) -> float | None:
    """Return the square root of the largest number of windows that contain one input element.

    An average changes by less, but how much less depends on the divisor at the border.
    """
    if getattr(layer, "divisor_override", None):
        return None
    window, stride, dilation = (
        v if isinstance(v, tuple) else (v,) * (x.dim() - 2)
        for v in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    geometry = zip(window, stride, dilation, strict=True)
    return math.sqrt(math.prod(math.ceil(k * math.gcd(d, s) / s) for k, s, d in geometry))


def _global_pool(layer: nn.Module, x: Tensor) -> float | None:
    """Return the constant of an average over the whole image."""
    outputs = layer(x).shape[2:].numel()
    return 1 / math.sqrt(x.shape[2:].numel()) if outputs == 1 else None


def _always(value: float) -> Callable[[nn.Module, Tensor], float]:
    return lambda layer, x: value


# The keys are the forward functions, so that a subclass with its own forward is not matched. GELU
# and SiLU are steeper than 1 to the right of their minimum.
_BOUNDS: dict[Callable[..., Tensor], Callable[..., float | None]] = {
    kind.forward: bound
    for kinds, bound in (
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
        ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _normalization),
        ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _pool),
        ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
        ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _global_pool),
        ((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _always(1.0)),
        ((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softplus), _always(1.0)),
        ((nn.Sigmoid,), _always(0.25)),
        ((nn.GELU,), _always(1.13)),
        ((nn.SiLU,), _always(1.1)),
        ((nn.LeakyReLU,), lambda layer, x: max(1.0, abs(layer.negative_slope))),
        ((nn.ELU,), lambda layer, x: max(1.0, abs(layer.alpha))),
        ((nn.Flatten,), lambda layer, x: 1.0 if layer.start_dim == 1 else None),
        ((Normalized,), lambda layer, x: 1 / layer.std.double().min().item()),
    )
    for kind in kinds
}
