"""The product of a model's layer norms, as a module that owns the vectors of power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyadv.menus import CONV_MATRICES, WEIGHT_NORMS, ConvMatrix, WeightNorm
from pyadv.ops.arguments import check_choice
from pyadv.ops.norms import norms
from pyadv.reference.norms import log_product
from pyadv.tensors import widen

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WARM_UP = 15  # iterations at construction


class NormProduct(nn.Module):
    """A module that computes log prod_l ||W_l|| over the linear and convolution layers of a model.

    A call returns the 0-dim logarithm, `norms()` the norm of each layer by name; both are
    differentiable. A layer counts once, with the shapes of its first call; layers that a forward
    pass in eval mode does not reach, biases and normalisation layers do not count.

    The spectral norm is ||W v|| with v a unit vector from power iteration on W^T W, held constant
    in the gradient (u v^T). It never exceeds the true value. In training mode each call first does
    `iters` iterations; in eval mode v does not change, and `iterate(n)` refines it (use 50 to 100
    iterations for a report). The vectors are buffers: they are part of the state dict, and `.to()`
    moves them.

    Args:
        model: the model, whose weights are read at each call. It is not a sub-module of this one.
        input_shape: the shape of one input, without the batch dimension. One forward pass in eval
            mode on zeros finds the layers' shapes; modes, statistics and random state are left
            unchanged.
        kind: "frobenius" or "spectral".
        conv: the matrix that represents a convolution with kernel (C_out, C_in / groups, k...).
            "reshape": the kernel as a matrix with C_out rows. It is cheap, but does not bound how
            the layer changes distances.
            "bound": the norm of that matrix times the square root of the largest number of outputs
            that one input pixel reaches, an upper bound on the spectral norm of the layer (Tsuzuku
            et al. 2018).
            "operator": the linear map from input to output, exact for the stride and padding.
            "bound" and "operator" give a Lipschitz constant of a chain of these layers and
            1-Lipschitz functions; that of kind "frobenius" is larger than that of "spectral".
        iters: power iterations per call in training mode, >= 0.

    Raises:
        TypeError: `model` is not a module. ValueError: unknown kind or conv, iters < 0, no layer to
            measure, or a padding other than zeros whose effect is not known in closed form
            ("bound", and "operator" with "frobenius").

    Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR
    2018), algorithm 1; Tsuzuku et al., "Lipschitz-Margin Training" (NeurIPS 2018), section 5.
    """

    _factors: Tensor

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        kind: WeightNorm = "frobenius",
        conv: ConvMatrix = "reshape",
        iters: int = 1,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"NormProduct: model must be a Module, got {type(model).__name__}")
        check_choice("NormProduct", "kind", kind, WEIGHT_NORMS)
        check_choice("NormProduct", "conv", conv, CONV_MATRICES)
        if iters < 0:
            raise ValueError(f"NormProduct: iters must be >= 0, got {iters}")
        self.kind, self.conv, self.iters = kind, conv, iters
        model = getattr(model, "_orig_mod", model)  # a compiled model may skip hooks
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *_CONVS))}
        shapes = _traced_shapes(model, layers, input_shape)
        if not shapes:
            raise ValueError("NormProduct: the model has no linear or convolution layer in use")
        self._layers = {name: layers[name] for name in shapes}  # a dict does not register modules
        factors = [self._factor(*item) for item in shapes.items()]
        first = next(iter(self._layers.values())).weight
        self.register_buffer("_factors", widen(first.new_tensor(factors)), persistent=False)
        draw = torch.Generator().manual_seed(0)
        for i, (name, (in_shape, _)) in enumerate(shapes.items()):
            layer = self._layers[name]
            weight = widen(layer.weight.detach())
            is_operator = conv == "operator" and isinstance(layer, _CONVS)
            if kind == "spectral":
                shape = in_shape if is_operator else (weight[0].numel(),)
                v = torch.randn(shape, generator=draw, device="cpu").to(weight)
                self.register_buffer(f"v{i}", v / torch.linalg.vector_norm(v))
            elif conv == "operator" and isinstance(layer, _CONVS):
                self._refuse_padding(name)
                self.register_buffer(f"root{i}", _tap_counts(layer, weight, in_shape).sqrt(), False)
        if kind == "spectral":
            self.iterate(_WARM_UP)

    def forward(self) -> Tensor:
        """Return the logarithm of the product, 0-dim; -inf (with gradient 0) if a norm is 0."""
        return log_product(self._values())

    def norms(self) -> dict[str, Tensor]:
        """Return the norm of each layer, 0-dim, by the name of the layer in the model."""
        return dict(zip(self._layers, self._values().unbind(), strict=True))

    def iterate(self, n: int) -> None:
        """Run n power iterations on every layer."""
        if self.kind != "spectral":
            return
        with torch.inference_mode(False), torch.enable_grad():
            for i, layer in enumerate(self._layers.values()):
                stored = getattr(self, f"v{i}")
                weight, v = widen(layer.weight.detach()), stored
                for _ in range(n):
                    v = v.detach().requires_grad_()
                    (step,) = torch.autograd.grad(
                        0.5 * self._image(layer, weight, v).square().sum(), v
                    )  # W^T W v
                    length = torch.linalg.vector_norm(step)
                    v = torch.where(length > 0, step / length, v)  # zero weights keep the vector
                stored.copy_(v.detach())

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, conv={self.conv!r}, layers={len(self._layers)}"

    def _values(self) -> Tensor:
        layers = self._layers.values()
        if self.kind == "frobenius":
            weights = [layer.weight for layer in layers]
            if self.conv == "operator":
                roots = (getattr(self, f"root{i}", 1.0) for i in range(len(weights)))
                weights = [widen(w) * r for w, r in zip(weights, roots, strict=True)]
            return norms(weights) * self._factors
        if self.training:
            self.iterate(self.iters)
        images = (
            self._image(layer, widen(layer.weight), getattr(self, f"v{i}").detach().clone())
            for i, layer in enumerate(layers)
        )
        return torch.stack([torch.linalg.vector_norm(image) for image in images]) * self._factors

    def _image(self, layer: nn.Module, weight: Tensor, v: Tensor) -> Tensor:
        """Apply the linear map of a layer, without its bias, to v."""
        if self.conv == "operator" and isinstance(layer, _CONVS):
            return layer._conv_forward(v, weight, None)
        return weight.flatten(1) @ v

    def _factor(self, name: str, shapes: tuple[torch.Size, torch.Size]) -> float:
        """Return the square root of the largest number of outputs that one input pixel reaches.

        In each dimension that number is at most the number of taps that meet a pixel at this
        stride, and at most the size of the output.
        """
        layer = self._layers[name]
        if self.conv != "bound" or not isinstance(layer, _CONVS):
            return 1.0
        self._refuse_padding(name)
        sizes = shapes[1][-len(layer.kernel_size) :]
        geometry = zip(layer.kernel_size, layer.stride, layer.dilation, sizes, strict=True)
        reached = (min(math.ceil(k * math.gcd(d, s) / s), size) for k, s, d, size in geometry)
        return math.sqrt(math.prod(reached))

    def _refuse_padding(self, name: str) -> None:
        mode = self._layers[name].padding_mode
        if mode != "zeros":
            raise ValueError(
                f"NormProduct: layer {name} has padding_mode={mode!r}; only kind='spectral' with "
                "conv='operator' or 'reshape' measures it"
            )


def _traced_shapes(
    model: nn.Module, layers: Mapping[str, nn.Module], input_shape: Sequence[int]
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return input and output shape of each layer at its first call, in the order of the calls."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            shapes.setdefault(name, (args[0].shape, out.shape))

        return hook

    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    cards = [parameter.device] if parameter.is_cuda else []
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(cards):
            model(parameter.new_zeros((1, *input_shape)))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return shapes


def _tap_counts(layer: Conv, weight: Tensor, in_shape: torch.Size) -> Tensor:
    """Count how often each kernel element appears in the matrix of the convolution."""
    with torch.inference_mode(False), torch.enable_grad():
        probe = torch.zeros_like(weight, requires_grad=True)
        ones = torch.ones(in_shape, dtype=weight.dtype, device=weight.device)
        (counts,) = torch.autograd.grad(layer._conv_forward(ones, probe, None).sum(), probe)
    return counts
