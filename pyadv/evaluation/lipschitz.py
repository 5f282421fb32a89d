"""How fast a network's logits can change with its input, at most: what a certificate needs.

Power iteration, and with it `ops.NormProduct`, comes to a layer's norm from below. Here every
number is an upper bound, which takes a chain of known modules: their constants multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyadv.models.normalized import Normalized
from pyadv.passes.borrow import borrowed, uncompiled

_ROUNDING = 1 + 1e-9  # far more than float64 loses in the norm of a layer
_DIRECT = "donot_use_mm_for_euclid_dist"  # whose differences do not cancel
_CHUNK = 2**22  # complex numbers of a convolution's transform held at a time


class NotCovered(ValueError):
    """A model that `lipschitz_bound` knows no bound for."""


@dataclass(frozen=True)
class LipschitzBound:
    """Upper bounds from L2 to L2: `body` on what comes before the last layer, if that is linear
    with weight `head` (C, n); on the logits themselves if `head` is None."""

    body: float
    head: Tensor | None

    @property
    def logits(self) -> float:
        """A Lipschitz constant of the logits."""
        return self.body if self.head is None else self.body * _largest_singular_value(self.head)

    def certified_radius(self, logits: Tensor, y: Tensor) -> Tensor:
        """(B,) float64: within this L2 distance of an input with these logits (B, C) no point is
        classified otherwise than y. 0 where the input itself is.

        min_j (z_y - z_j) / L_yj, where L_yj bounds the difference of the two logits: ||w_y - w_j||
        times the bound of the body, or sqrt(2) times that of the logits (Tsuzuku et al. 2018,
        sections 4.1 and 4.2). In exact arithmetic: the rounding of the network's own forward pass
        is not bounded.
        """
        z = logits.double()
        gap = z.gather(1, y[:, None]) - z
        if self.head is None:
            bound = torch.full_like(z, math.sqrt(2) * self.body)
        else:
            head = self.head.to(z)
            bound = self.body * _ROUNDING * torch.cdist(head[y], head, compute_mode=_DIRECT)
        # Two logits that cannot move apart: 0 / 0 is a tie, and no certificate.
        radius = (gap / bound).nan_to_num(nan=0.0, posinf=torch.inf)
        return radius.scatter(1, y[:, None], torch.inf).amin(1).clamp(min=0)


def lipschitz_bound(model: nn.Module, input_shape: Sequence[int]) -> LipschitzBound:
    """An upper bound on the Lipschitz constant of `model` in eval mode, from L2 to L2.

    The product over a chain: `nn.Sequential`, nested at will and inside `Normalized`, of linear
    layers, convolutions with zero padding, batch normalisation, pooling and activations. A linear
    layer counts with its largest singular value. A convolution counts with that of the periodic
    convolution on the smallest torus its padded input fits into; it is a part of that one, and
    little smaller. Neither is iterated for: both are eigenvalues in float64.

    Args:
        model: is left as it was. Its weights are read once; the bound does not follow them.
        input_shape: of one input, without the batch dimension.

    Raises:
        NotCovered: for a module that is not on the list or has no bound, with its name.

    Sources: Tsuzuku et al., "Lipschitz-Margin Training" (NeurIPS 2018); Sedghi, Gupta and Long,
    "The Singular Values of Convolutional Layers" (ICLR 2019), for the periodic convolution.
    """
    model = uncompiled(model)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x, body, head = parameter.new_zeros((1, *input_shape)), 1.0, None
    with torch.inference_mode(False), torch.no_grad(), borrowed(model):
        for name, module in _chain(model, ""):
            if head is not None:
                body *= _largest_singular_value(head)
            head = None
            if _is(module, nn.Linear):
                head = module.weight.detach().double()
            else:
                body *= _constant(name, module, x)
            if not _is(module, Normalized):  # the modules inside it follow in the chain
                x = module(x)
    return LipschitzBound(body, head)


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it computes what `kind` does; a subclass may have another forward."""
    return type(module).forward is kind.forward


def _chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are applied one after the other."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotCovered(f"lipschitz_bound: {name or 'the model'} has forward hooks")
    if _is(module, nn.Sequential):
        for child, inside in module._modules.items():  # named_children leaves repetitions out
            yield from _chain(inside, f"{name}.{child}".lstrip("."))
    else:
        yield name, module
        if _is(module, Normalized):
            yield from _chain(module.model, f"{name}.model".lstrip("."))


def _constant(name: str, module: nn.Module, x: Tensor) -> float:
    bound = _BOUNDS.get(type(module).forward)
    value = None if bound is None else bound(module, x)
    if value is None:
        kind = type(module).__name__
        raise NotCovered(f"lipschitz_bound: no bound is known for {name or 'the model'} ({kind})")
    return value * _ROUNDING


def _convolution(layer: nn.Module, x: Tensor) -> float | None:
    """The largest singular value over the frequencies of the torus.

    With stride s, s input frequencies per dimension fall on each output frequency: their transforms
    of the kernel stand side by side, divided by sqrt(s).
    """
    if layer.padding_mode != "zeros":
        return None
    k, s, d, padding = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    if padding == "same":
        padded = [a * (b - 1) for a, b in zip(d, k, strict=True)]
    else:
        padded = [0] * len(k) if padding == "valid" else [2 * p for p in padding]
    sizes = zip(x.shape[-len(k) :], padded, s, strict=True)
    outputs = [math.ceil((size + more) / stride) for size, more, stride in sizes]

    def grid(counts: Sequence[int]) -> Tensor:
        axes = (torch.arange(c, dtype=torch.float64, device=x.device) for c in counts)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    n, stride, dilation = (grid([1]).new_tensor(v) for v in (outputs, s, d))
    # The other half of the frequencies has the complex conjugates.
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
    """Of a batch of matrices in double precision, not below the true value."""
    if not matrices.numel():
        return 0.0
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    return math.sqrt(torch.linalg.eigvalsh(matrices @ matrices.mH).max()) * _ROUNDING


def _normalization(layer: nn.Module, x: Tensor) -> float | None:
    """Of batch normalisation with running statistics."""
    if layer.running_var is None:
        return None
    slope = (layer.running_var.double() + layer.eps).rsqrt()
    return (slope if layer.weight is None else slope * layer.weight).abs().max().item()


def _pool(layer: nn.Module, x: Tensor) -> float | None:
    """The root of in how many windows an input can stand. An average changes by less, but by how
    much less depends on what the layer divides by at the border."""
    if getattr(layer, "divisor_override", None):
        return None
    window, stride, dilation = (
        v if isinstance(v, tuple) else (v,) * (x.dim() - 2)
        for v in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    geometry = zip(window, stride, dilation, strict=True)
    return math.sqrt(math.prod(math.ceil(k * math.gcd(d, s) / s) for k, s, d in geometry))


def _global_pool(layer: nn.Module, x: Tensor) -> float | None:
    """Of an average over the whole image."""
    outputs = layer(x).shape[2:].numel()
    return 1 / math.sqrt(x.shape[2:].numel()) if outputs == 1 else None


def _always(value: float) -> Callable[[nn.Module, Tensor], float]:
    return lambda layer, x: value


# By what computes them: a subclass with a forward of its own is none of these. GELU and SiLU are
# steeper than 1 where they come out of their dip.
_BOUNDS: dict[Callable[..., Tensor], Callable[[nn.Module, Tensor], float | None]] = {
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
