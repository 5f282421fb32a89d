"""A cheaper network that computes the same: what `speed="fast"` attacks.

torch.fx reads the network as a graph of operations, and the graph is computed with weights that are
folded, laid out and frozen for an attack:

- BatchNorm, which in evaluation mode is a multiplication and an addition, goes into the weights of
  the convolution before it; where there is none, it becomes one operation;
- a ReLU writes over what it reads where nothing else reads that;
- weights of wide networks lie in channels-last order, which the CPU's convolutions prefer;
- there, 3x3 convolutions in float32 and their input gradients are Winograd's, with 4 times less
  multiplications, at stride 2 with 1.8 times less, and with sums and ReLUs that follow in one pass;
- the input gradient of a first layer, with its few channels, is a matrix product and a sum of
  patches on the CPU, where oneDNN is several times slower than that.

A network that fx cannot follow is attacked as it is, and so is one whose view answers differently.
"""

from __future__ import annotations

import contextlib
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from pyadv import ops
from pyadv.ops.registry import has_kernel
from pyadv.passes.borrow import (
    Output,
    borrowed,
    footprint,
    has_hooks,
    pick_logits,
    unwrap,
)

SPEEDS = {"exact": None, "fast": None, "bfloat16": torch.bfloat16}  # the arithmetic of the view

_NORM_AFTER = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_WIDE = 64  # channels from which channels-last pays
_NARROW = 4  # channels up to which oneDNN's input gradient is slow
# Where Winograd's convolution pays: by stride, the paddings it takes and the channels, of input and
# output, from which it is faster than oneDNN's; and the least pixels per side of the output.
_WINOGRAD = {(1, 1): ((0, 1, 2), 16), (2, 2): ((1,), 32)}
_WINOGRAD_SIDE = 4
_CHECKED = 2  # rows on which the view is compared with the model
_PATCH_ROWS = 32  # samples whose patches stay in the cache

_views: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype | None, FastView]] = (
    weakref.WeakKeyDictionary()
)
# What a model was when no view could be had, as in `FastView.agreed`.
_refused: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype | None, list[Any]]] = (
    weakref.WeakKeyDictionary()
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_TF32 = 2**-10  # machine epsilon of what a GPU may multiply float32 in


class FastView:
    """The network in evaluation mode with weights of its own, those at the last `refresh`. It has
    input gradients, of first order; parameters get none."""

    def __init__(
        self, graph: fx.GraphModule, parts: list[_Weighted | _Affine], dtype: torch.dtype | None
    ):
        self.module, self._parts, self._dtype = graph, parts, dtype
        self.agreed: list[Any] = []  # what it was compared on, see `fast_view`
        wide = any(isinstance(p, _Weighted) and p.out_channels >= _WIDE for p in parts)
        self._layout = torch.channels_last if wide else torch.contiguous_format
        self.refresh()

    def __call__(self, x: Tensor) -> Any:
        if self._dtype is None:
            return self.module(x)
        with torch.autocast(x.device.type, self._dtype):
            return self.module(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters and statistics that the model has now, in the same memory."""
        for part in self._parts:
            part.refresh(self._dtype, self._layout)


def fast_view(
    model: Callable[..., Any],
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    output: Output = None,
) -> Callable[..., Any]:
    """A callable that computes what `model` does on inputs like x, and its input gradients, faster.

    It takes the weights as they are now; after a change of the model call its `refresh()`, or this
    function again. The model is not changed. Where no view can be had (`model` is compiled, has
    hooks, branches on values, draws random numbers, ...) the result is the model itself. While a
    model is read for the first time, no other thread may run one: torch.fx looks at all calls.

    The logits on the first two rows of x have been compared: no entry is farther from the model's
    than sqrt(u) times their largest, u the machine epsilon of `dtype` or of the logits (3e-4 in
    float32, 0.03 where a GPU multiplies in TF32, 0.09 in bfloat16); typically they are as near as
    rounding, 5e-6. A model that no view was found for is read again when its attributes change.

    Args:
        model: in evaluation mode; maps x to logits (B, C), or see `output`.
        x: (B, ...) an input; of an empty one nothing can be learned.
        dtype: torch.bfloat16 or torch.float16 for convolutions and linear layers (autocast).
        output: how to find the logits in what the model returns, as in `PGD`.

    Raises:
        ValueError: for a model in training mode, where BatchNorm is not an affine map.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod") or not len(x):
        return model
    modules = list(model.modules())
    if any(m.training for m in modules):
        raise ValueError("fast_view: model must be in evaluation mode; call model.eval()")
    replaced = [m for m in modules if "forward" in vars(m)]
    if dtype is not None and replaced == [model] and hasattr(model, "_original_forward"):
        replaced = []  # Accelerate's autocast, around the whole: the view has its own
    if has_hooks(model) or replaced:
        return model
    known, refused = _views.setdefault(model, {}), _refused.setdefault(model, {})
    now = _read(x, output, model)
    if refused.get(dtype) == now:  # reading it again would take long
        return model
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.no_grad():
        view = known.pop(dtype, None)
        if view:
            view.refresh()
        # A GPU, which would have to be waited for, is asked again only for another model or input.
        asked = view and x.is_cuda and view.agreed == now
        if not (asked or (view and _agrees(view, model, x, dtype, output))):
            view = _trace(model, dtype)  # for the first time, or because the model has changed
            if not (view and _agrees(view, model, x, dtype, output)):
                refused[dtype] = now
                return model
    view.agreed = now
    return known.setdefault(dtype, view)


@contextlib.contextmanager
def attacked(
    model: Callable[..., Any], x: Tensor, speed: str, bn: str, output: Output
) -> Iterator[Callable[..., Any]]:
    """What stands for the model during an attack: itself, or its view."""
    if speed == "exact" or bn != "eval":
        yield model
        return
    with torch.inference_mode(False), borrowed(unwrap(model)):
        yield fast_view(model, x, dtype=SPEEDS[speed], output=output)


def _read(x: Tensor, output: Output, model: nn.Module) -> list[Any]:
    """What a view was made for. Numbers and words as they are, all else by identity: views are
    known as long as their models live, and must not be what keeps them alive."""
    read = [output, *footprint(model)]
    return [x.shape[1:], x.dtype, *(v if type(v) in _PLAIN else id(v) for v in read)]


def _agrees(
    view: FastView, model: nn.Module, x: Tensor, dtype: torch.dtype | None, output: Output
) -> bool:
    try:
        expected, logits = (pick_logits(m(x[:_CHECKED].clone()), output) for m in (model, view))
    except Exception:  # the user's code, on fewer rows or in a form it was not written for
        return False
    if logits.shape != expected.shape:
        return False
    unit = max(torch.finfo(t).eps for t in (expected.dtype, dtype or expected.dtype))
    if x.is_cuda and torch.backends.cudnn.conv.fp32_precision != "ieee":
        unit = max(unit, _TF32)
    wide = expected.double()
    off = (logits.double() - wide).abs().max()
    return bool(off <= math.sqrt(unit) * wide.abs().max())


def _trace(model: nn.Module, dtype: torch.dtype | None) -> FastView | None:
    """None if fx cannot follow the model, or if following leaves traces in it."""
    before = [(m, dict(vars(m))) for m in model.modules()]
    try:
        graph = fx.Tracer().trace(model)
        held = {n.target: operator.attrgetter(n.target)(model) for n in _nodes(graph, "get_attr")}
    except Exception:  # the user's code, run on stand-ins for tensors
        return None
    finally:
        changed = [_restore(m, old) for m, old in before]
    if any(changed):
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    held |= {n.target: modules[n.target] for n in _nodes(graph, "call_module")}
    parts = _rewrite(graph, held)
    return FastView(fx.GraphModule(held, graph), parts, dtype)


def _nodes(graph: fx.Graph, op: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == op]


def _restore(m: nn.Module, old: dict[str, Any]) -> bool:
    """Whether the attributes of m were others than `old`, apart from the tracer's constants."""
    now = vars(m)
    new = {k for k in now if k not in old}
    same = all(k in now and now[k] is v for k, v in old.items())
    if not same or new:
        now.clear()
        now.update(old)
    return not same or any(not k.startswith("_tensor_constant") for k in new)


def _rewrite(graph: fx.Graph, held: dict[str, Any]) -> list[_Weighted | _Affine]:
    """Puts parts of our own in the place of layers; `held` gets them under new names."""
    parts: dict[fx.Node, _Weighted | _Affine] = {}
    for node in list(graph.nodes):
        layer = held[node.target] if node.op == "call_module" else None
        before = node.args[0] if node.args else None
        alone = isinstance(before, fx.Node) and len(before.users) == 1
        if type(layer) in (*_NORM_AFTER, nn.Linear):
            parts[node] = _Weighted(layer)
        elif type(layer) in _NORM_AFTER.values() and layer.running_mean is not None:
            conv = parts.get(before)
            if alone and isinstance(conv, _Weighted) and conv.takes(layer):
                conv.norm = (layer,)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
            else:
                parts[node] = _Affine(layer)
        elif _is_relu(node, layer) and alone and (before in parts or _is_sum(before)):
            with graph.inserting_before(node):  # what it overwrites, no backward pass reads
                node.replace_all_uses_with(graph.call_function(torch.relu_, (before,)))
            graph.erase_node(node)
    _fuse(graph, parts)
    for i, (node, part) in enumerate(parts.items()):
        node.target = f"_part_{i}"
        held[node.target] = part
    return list(parts.values())


def _fuse(graph: fx.Graph, parts: dict[fx.Node, _Weighted | _Affine]) -> None:
    """Lets Winograd's convolutions add what is added to them and take the ReLU after that."""
    winograd = {n: p for n, p in parts.items() if isinstance(p, _Weighted) and p.winograd}
    for node in [n for n in graph.nodes if _is_sum(n) and len(n.args) == 2 and not n.kwargs]:
        for conv, other in (node.args, node.args[::-1]):
            if (
                conv in winograd
                and conv is not other
                and isinstance(other, fx.Node)
                and (len(conv.users), len(conv.args), conv.kwargs) == (1, 1, {})
                and all(n in parts for n in _between(conv, node))  # nothing written in place
            ):
                node.prepend(conv)
                conv.args = (*conv.args, other)
                node.replace_all_uses_with(conv)
                graph.erase_node(node)
                break
    for node in list(graph.nodes):
        if node.target is torch.relu_ and node.args[0] in winograd:
            winograd[node.args[0]].relu = True
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node, part in winograd.items():
        inputs = all(user.args[:1] == (node,) != user.args[1:] for user in node.users)
        readers = [winograd.get(user) for user in node.users]
        if part.relu and inputs and all(readers):
            part.readers_mask = True
            for reader in readers:
                reader.source = (part,)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while (first := first.next) is not last:
        yield first


def _is_relu(node: fx.Node, layer: nn.Module | None) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(layer) is nn.ReLU or (
        node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_)
    )


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, torch.add)


class _Weighted(nn.Module):
    """A convolution, with the BatchNorm after it if there is one, or a linear layer. The model's
    layers are held in tuples, so that they do not become sub-modules here."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.norm = (layer,), ()
        self.made: set[str] = set()  # of the tensors below, those that are not the layer's
        self.points: dict[bool, Tensor] = {}
        # What is fused, see `_fuse`: a ReLU after this one, whose gradient, if `readers_mask`, is
        # taken by the convolutions that read it; their `source` is this one.
        self.relu = self.readers_mask = False
        self.source: tuple[_Weighted, ...] = ()
        self.convolves = not isinstance(layer, nn.Linear)
        self.out_channels = layer.weight.shape[0] if layer.weight.dim() == 4 else 0
        # Same padding has no numbers, other paddings are not of zeros.
        plain = (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
        self.narrow = plain and is_narrow(layer.weight, layer.groups)
        paddings, least = _WINOGRAD.get(getattr(layer, "stride", None), ((), 0))
        self.winograd = (
            plain
            and (layer.kernel_size, layer.dilation) == ((3, 3), (1, 1))
            and layer.padding in [(p, p) for p in paddings]
            and min(layer.in_channels, layer.out_channels) >= least
        )

    def takes(self, norm: nn.Module) -> bool:
        return not self.norm and _NORM_AFTER.get(type(self.layer[0])) is type(norm)

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        (layer,) = self.layer
        weight, bias = layer.weight.detach(), layer.bias
        for norm in self.norm:
            scale, shift = scale_and_shift(*_affine(norm))
            weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
        if weight.dim() != 4 or not (weight.is_cpu or dtype):  # float32 on a GPU stays as it is
            layout = torch.preserve_format
        if _renew(self, "weight", weight, dtype or weight.dtype, layout, layer.weight):
            self.points.clear()
        _renew(self, "bias", bias, self.weight.dtype, owner=layer.bias)
        self.has_points = (
            self.winograd
            and self.weight.is_cpu
            and self.weight.dtype == torch.float32
            and layout == torch.channels_last
            and has_kernel("winograd", self.weight.device)
        )

    def points_of(self, transposed: bool) -> Tensor:
        """The weight for Winograd's convolution, made when it is first asked for."""
        if transposed not in self.points:
            stride = self.layer[0].stride[0]
            self.points[transposed] = ops.winograd_weight(self.weight, transposed, stride)
        return self.points[transposed]

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        (layer,) = self.layer
        if self.has_points and _has_tiles(x, layer) and _fits(added, x, layer):
            return _WinogradConv.apply(x, added, self, layer.padding[0], layer.stride[0])
        if self.source and self.source[0].has_points:
            x = torch.relu(x)  # which the source has done; for the gradient, which it has not
        y = self.convolved(x)
        y = y if added is None else y + added
        return y.relu_() if self.relu else y

    def convolved(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        if not self.convolves:
            return F.linear(x, self.weight, self.bias)
        if self.narrow and x.is_cpu and x.requires_grad:
            return _NarrowConv.apply(
                x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation
            )
        return layer._conv_forward(x, self.weight, self.bias)


class _Affine(nn.Module):
    """A BatchNorm that no convolution takes in."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = (norm,)
        self.made: set[str] = set()

    def refresh(self, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
        (norm,) = self.norm
        scale, shift = scale_and_shift(*_affine(norm))
        _renew(self, "scale", scale, dtype or scale.dtype)
        _renew(self, "shift", shift, dtype or shift.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 2))
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


def _renew(
    part: nn.Module,
    name: str,
    value: Tensor | None,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.preserve_format,
    owner: Tensor | None = None,
) -> bool:
    """The tensor `name` becomes `value`, converted. Unless it is the memory of `owner`, it stays
    where it is, because a CUDA graph reads it there. Returns False if it was equal before, as far
    as that can be known on the CPU."""
    old = getattr(part, name, None)
    if value is None or (old is not None and old.shape != value.shape):
        old = None
    if old is not None and name in part.made and old.device == value.device:
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
        return True  # the layer's own memory: its values may be others
    setattr(part, name, new)
    return True


class _NarrowConv(torch.autograd.Function):
    """A two-dimensional convolution of few input channels."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(weight)
        ctx.size = x.shape[-2:]
        ctx.window = {"stride": stride, "padding": padding, "dilation": dilation}
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return narrow_input_gradient(grad, weight, ctx.size, **ctx.window), *(None,) * 5


def is_narrow(weight: Tensor, groups: int) -> bool:
    """Whether `narrow_input_gradient` is worth its while on the CPU, for this convolution."""
    return weight.dim() == 4 and weight.shape[1] <= _NARROW and groups == 1


def narrow_input_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Of a two-dimensional convolution of few channels, by a matrix product and a sum of patches;
    `size` (H, W) of its input."""
    kernel, window = weight.detach().flatten(1).T, weight.shape[2:]
    images = []
    for part in grad.detach().split(_PATCH_ROWS):
        patches = kernel @ part.flatten(2)
        patches = patches.reshape(1, -1, patches.shape[2])  # to `fold`, one image of many channels
        folded = F.fold(patches, size, window, dilation, padding, stride)
        images.append(folded.view(len(part), -1, *size))
    return torch.cat(images)


def _output_size(x: Tensor, layer: nn.Conv2d) -> list[int]:
    windows = zip(x.shape[2:], layer.padding, layer.stride, strict=True)
    return [(n + 2 * padding - 3) // stride + 1 for n, padding, stride in windows]


def _has_tiles(x: Tensor, layer: nn.Conv2d) -> bool:
    return (
        x.dim() == 4
        and min(_output_size(x, layer)) >= _WINOGRAD_SIDE
        and not torch.is_autocast_enabled(x.device.type)
    )


def _fits(added: Any, x: Tensor, layer: nn.Conv2d) -> bool:
    """Whether it needs no broadcasting or conversion."""
    if added is None:
        return True
    shape = (x.shape[0], layer.out_channels, *_output_size(x, layer))
    return isinstance(added, Tensor) and added.shape == shape and added.dtype == x.dtype


class _WinogradConv(torch.autograd.Function):
    """A two-dimensional convolution with 3x3 windows, and what is fused with it."""

    @staticmethod
    def forward(ctx, x, added, part, padding, stride):
        ctx.shape, ctx.window = x.shape, (padding, stride)
        points = part.points_of(transposed=False)
        more = {"added": added, "relu": part.relu}
        y = ops.winograd_conv2d(x, points, part.bias, part.out_channels, padding, stride, **more)
        if any(ctx.needs_input_grad):
            mask = x if part.source else None
            own_mask = y if part.relu and not part.readers_mask else None
            ctx.save_for_backward(part.points_of(transposed=True), mask, own_mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        points, mask, own_mask = ctx.saved_tensors
        if own_mask is not None:
            grad = torch.ops.aten.threshold_backward(grad, own_mask, 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.winograd_conv2d_input(grad, points, ctx.shape, *ctx.window, mask=mask)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None


def _affine(norm: nn.Module) -> tuple[Any, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps


def scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Of BatchNorm with its running statistics: x scale + shift."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
