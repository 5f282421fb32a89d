"""The product of a model's layer norms, as a module that keeps what power iteration needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyadv.ops.arguments import check_choice
from pyadv.ops.norms import norms
from pyadv.reference.norms import log_product
from pyadv.tensors import widen

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WARM_UP = 15  # iterations at construction


class NormProduct(nn.Module):
    """log prod_l ||W_l|| over the linear and convolution layers of a model, differentiable.

    Calling it gives the 0-dim logarithm, `norms()` the norm of each layer by name. A layer counts
    once, with the shapes of its first call; layers that a forward pass in eval mode does not reach,
    biases and normalisation layers do not count.

    The spectral norm is ||W v|| with v a unit vector from power iteration on W^T W, held constant
    in the gradient (u v^T). It never exceeds the true value. While the module is in training mode
    each call first does `iters` iterations; in eval mode v stays, and `iterate(n)` refines it (50
    to 100 for a report). The vectors are buffers: they are saved with the state, and `.to()`
    moves them to where the weights are.

    Args:
        model: its weights are read at each call; it is not a sub-module of this one.
        input_shape: of one input, without the batch dimension. One forward pass in eval mode on
            zeros finds the layers' shapes; modes, statistics and random state stay as they were.
        kind: "frobenius" or "spectral".
        conv: what stands for a convolution with kernel (C_out, C_in / groups, k...).
            "reshape": the kernel as a matrix with C_out rows. Cheap, and no bound on what the layer
            does to distances.
            "bound": the same times the root of how many outputs an input pixel reaches, an upper
            bound on the layer's spectral norm (Tsuzuku et al. 2018).
            "operator": the linear map from input to output, exact for the stride and padding.
            Only "bound" and "operator" give a Lipschitz constant (with kind "spectral", or larger
            with "frobenius"), of a chain of these layers and 1-Lipschitz functions.
        iters: power iterations per call in training mode, >= 0.

    Raises:
        TypeError: `model` is no module. ValueError: unknown kind or conv, iters < 0, no layer to
            measure, or a padding other than zeros where its effect is not known in closed form
            ("bound", and "operator" with "frobenius").

    Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR
    2018), algorithm 1; Tsuzuku et al., "Lipschitz-Margin Training" (NeurIPS 2018), section 5.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        kind: str = "frobenius",
        conv: str = "reshape",
        iters: int = 1,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"NormProduct: model must be a Module, got {type(model).__name__}")
        check_choice("NormProduct", "kind", kind, ("frobenius", "spectral"))
        check_choice("NormProduct", "conv", conv, ("reshape", "bound", "operator"))
        if iters < 0:
            raise ValueError(f"NormProduct: iters must be >= 0, got {iters}")
        self.kind, self.conv, self.iters = kind, conv, iters
        model = getattr(model, "_orig_mod", model)  # hooks of a compiled model may not run
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
                v = torch.randn(shape, generator=draw).to(weight)
                self.register_buffer(f"v{i}", v / torch.linalg.vector_norm(v))
            elif is_operator:
                self._refuse_padding(name)
                self.register_buffer(f"root{i}", _tap_counts(layer, weight, in_shape).sqrt(), False)
        if kind == "spectral":
            self.iterate(_WARM_UP)

    def forward(self) -> Tensor:
        """The logarithm of the product, 0-dim; -inf (with gradient 0) if a norm is 0."""
        return log_product(self._values())

    def norms(self) -> dict[str, Tensor]:
        """The norm of each layer by its name in the model, 0-dim."""
        return dict(zip(self._layers, self._values().unbind(), strict=True))

    def iterate(self, n: int) -> None:
        """n power iterations on every layer."""
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
        """The layer's linear map, without its bias."""
        if self.conv == "operator" and isinstance(layer, _CONVS):
            return layer._conv_forward(v, weight, None)
        return weight.flatten(1) @ v

    def _factor(self, name: str, shapes: tuple[torch.Size, torch.Size]) -> float:
        """Root of the most outputs that one input pixel reaches, per dimension at most the taps
        that a stride leaves it and the size of the output."""
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
    model: nn.Module, layers: dict[str, nn.Module], input_shape: Sequence[int]
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Input and output shape of each layer at its first call, in the order of the calls."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def record(name: str):
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


def _tap_counts(layer: nn.Module, weight: Tensor, in_shape: torch.Size) -> Tensor:
    """How often each kernel element stands in the matrix of the convolution."""
    with torch.inference_mode(False), torch.enable_grad():
        probe = torch.zeros_like(weight, requires_grad=True)
        ones = torch.ones(in_shape, dtype=weight.dtype, device=weight.device)
        (counts,) = torch.autograd.grad(layer._conv_forward(ones, probe, None).sum(), probe)
    return counts
