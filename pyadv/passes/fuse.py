"""Rewriting the torch.fx graph of a network for a GPU: fewer and larger calls, in one dtype.

- A convolution takes the BatchNorm, the residual sum and the ReLU that follow it, where nothing
  else reads what lies between. A bias without a ReLU goes to the layer that the result is added to.
- A BatchNorm that no convolution takes is one call with the sum before it and the ReLU after it.
- A result with two readers is returned twice, so that their gradients are summed in the call that
  masks them.
- Global pooling keeps its gradient in the order of the pixels, and `flatten` before a linear layer
  goes into the order of its columns.

Everything else stays as it is. `fused` has the layers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pyadv.passes.fused import (
    Convolutions,
    FusedAffine,
    FusedConv,
    FusedLinear,
    entered,
    pooled,
)
from pyadv.passes.layers import WeightedLayer, is_affine, is_plain, is_weighted, takes
from pyadv.passes.rewrite import Network, between, first_input, is_alone, is_relu, is_sum, renamed

_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation mode

Part = FusedConv | FusedAffine | FusedLinear | WeightedLayer
Parts = dict[fx.Node, Part]


def fuse(
    graph: fx.Graph,
    held: dict[str, Any],
    convolutions: Convolutions,
    dtype: torch.dtype | None,
) -> tuple[Network, list[Part]]:
    """Return the rewritten network and its parts, the layers that replace the model's.

    Args:
        graph: what the model computes; changed in place.
        held: the model's layer or tensor for each target that the graph names.
        convolutions: the fused convolutions of the device.
        dtype: in which the parts compute; None: in that of their weights.
    """
    return _Fusion(graph, held, convolutions, dtype).result()


class _Fusion:
    """The rewriting of one graph.

    `parts` has the layer of each node that calls one. `passed_on` has, for a node of a FusedAffine,
    the nodes that read what its BatchNorm reads.
    """

    def __init__(
        self,
        graph: fx.Graph,
        held: dict[str, Any],
        convolutions: Convolutions,
        dtype: torch.dtype | None,
    ):
        self.graph, self.held = graph, held
        self.convolutions, self.dtype = convolutions, dtype
        self.parts: Parts = {}
        self.passed_on: dict[fx.Node, list[fx.Node]] = {}

    def result(self) -> tuple[Network, list[Part]]:
        self._replace_layers()
        self._pool()
        rectified = self._take_relus()
        self._take_sums(rectified)
        self._share_inputs()
        self._move_biases()
        self._flatten()
        self._return_twice()
        self.graph.lint()
        names = renamed(self.graph, self.held, self.parts)
        return Network(self.graph, names), list(self.parts.values())

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.held[str(node.target)] if node.op == "call_module" else None

    def _erase(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _replace_layers(self) -> None:
        """Make convolutions, linear layers and BatchNorms parts; convolutions take BatchNorms."""
        for node in list(self.graph.nodes):
            layer = self._layer(node)
            before = first_input(node)
            if before is None or len(node.args) > 1 or node.kwargs:
                continue
            if type(layer) in _IDENTITIES:
                self._erase(node, before)
            elif is_plain(layer):
                self.parts[node] = FusedConv(layer, self.convolutions)
            elif type(layer) is nn.Linear:
                self.parts[node] = FusedLinear(layer)
            elif is_weighted(layer):
                self.parts[node] = WeightedLayer(layer)
                with self.graph.inserting_before(node):
                    enter = (before, self.dtype or layer.weight.dtype)
                    node.args = (self.graph.call_function(entered, enter),)
            elif is_affine(layer):
                conv = self.parts.get(before) if is_alone(before) else None
                if isinstance(conv, (FusedConv, WeightedLayer)) and takes(conv, layer):
                    conv.norm = (layer,)
                    self._erase(node, before)
                else:
                    self.parts[node] = FusedAffine(layer)

    def _pool(self) -> None:
        for node in list(self.graph.nodes):
            how = _global_mean(node, self._layer(node))
            if how is not None:
                with self.graph.inserting_before(node):
                    mean = self.graph.call_function(pooled, (node.args[0], *how))
                self._erase(node, mean)

    def _take_relus(self) -> dict[fx.Node, float]:
        """Make ReLUs part of the layers before them; return the slopes of those after sums."""
        rectified: dict[fx.Node, float] = {}
        for node in list(self.graph.nodes):
            slope, before = _slope(node, self._layer(node)), first_input(node)
            if slope is None or not is_alone(before):
                continue
            part = self.parts.get(before)
            if isinstance(part, WeightedLayer):
                continue
            if isinstance(part, FusedAffine):
                if part.slope != 1:
                    continue
                part.slope = slope
            elif part is not None:
                if part.slope is not None:
                    continue
                part.slope = slope
            elif is_sum(before) and _terms(before) and before not in rectified:
                rectified[before] = slope
            else:
                continue
            self._erase(node, before)
        return rectified

    def _take_sums(self, rectified: dict[fx.Node, float]) -> None:
        """Make sums part of the convolution before their ReLU, or of the BatchNorm after them."""
        for node in [n for n in self.graph.nodes if is_sum(n) and _terms(n)]:
            if node in rectified:
                if not self._into_convolution(node, rectified[node]):
                    self._with_relu(node, rectified[node])
            else:
                self._into_norm(node)

    def _into_convolution(self, node: fx.Node, slope: float) -> bool:
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        terms = node.all_input_nodes
        for conv in sorted(terms, key=lambda n: order[n], reverse=True):  # the later moves less
            (other,) = [a for a in terms if a is not conv]
            part = self.parts.get(conv)
            if not isinstance(part, FusedConv) or part.slope is not None or len(conv.args) != 1:
                continue
            if is_alone(conv) and self._nothing_written(conv, node):
                part.slope = slope
                node.prepend(conv)
                conv.args = (*conv.args, other)
                self._erase(node, conv)
                return True
        return False

    def _with_relu(self, node: fx.Node, slope: float) -> None:
        """Make a sum and its ReLU one call."""
        with self.graph.inserting_before(node):
            both = self.graph.call_module("", node.args)  # named by `renamed`
        part = self.parts[both] = FusedAffine(None)
        part.slope = slope
        self._erase(node, both)

    def _into_norm(self, node: fx.Node) -> None:
        for norm in list(node.users):
            part = self.parts.get(norm)
            if isinstance(part, FusedAffine) and norm.args == (node,):
                if self._nothing_written(node, norm):
                    others = [user for user in node.users if user is not norm]
                    node.append(norm)
                    norm.args = node.args
                    self._pass_on(norm, part, node, others)
                    self.graph.erase_node(node)
                return

    def _share_inputs(self) -> None:
        """Let later readers of what a BatchNorm reads be given it by the BatchNorm, which sums
        their gradients."""
        for node in list(self.graph.nodes):
            part, read = self.parts.get(node), first_input(node)
            if not isinstance(part, FusedAffine) or read is None or len(node.args) != 1:
                continue
            part_of = read.args[0] if read.target is operator.getitem else read
            if part_of in self.parts:
                later = set(_after(node))
                others = [user for user in read.users if user in later]
                self._pass_on(node, part, read, others)

    def _pass_on(
        self, norm: fx.Node, part: FusedAffine, read: fx.Node, others: list[fx.Node]
    ) -> None:
        if others:
            part.passes_on = True
            with self.graph.inserting_after(norm):
                passed = self.graph.call_function(operator.getitem, (norm, -1))
            self.passed_on[norm] = [passed]
            for user in others:
                user.replace_input_with(read, passed)

    def _move_biases(self) -> None:
        for node, part in self.parts.items():
            other = node.args[1] if len(node.args) > 1 else None
            if not isinstance(part, FusedConv) or not isinstance(other, fx.Node):
                continue
            theirs = self.parts.get(other)
            if isinstance(theirs, FusedConv) and theirs.slope is None and is_alone(other):
                part.takes_bias, theirs.gives_bias = (theirs,), True

    def _flatten(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_method" and node.target == "view" and _are_sizes(node.args[1:]):
                node.target = "reshape"  # which also takes images in channels-last order
            part = self.parts.get(node)
            if not isinstance(part, FusedLinear):
                continue
            flat = first_input(node)
            if is_alone(flat) and _flattens(flat, self._layer(flat)):
                part.flattens = True
                node.args = (flat.args[0],)
                self.graph.erase_node(flat)

    def _return_twice(self) -> None:
        for node, part in self.parts.items():
            passed = self.passed_on.get(node, [])
            users = [u for u in _after(node) if u in node.users and u not in passed]
            if isinstance(part, WeightedLayer):
                continue
            twice = part.slope is not None and len(users) > 1
            if not (twice or passed):
                continue
            part.readers = 2 if twice else 1
            for i, chosen in enumerate((users[:1], users[1:]) if twice else (users,)):
                with self.graph.inserting_after(node):
                    item = self.graph.call_function(operator.getitem, (node, i))
                for user in chosen:
                    user.replace_input_with(node, item)

    def _nothing_written(self, first: fx.Node, last: fx.Node) -> bool:
        """Return whether no node between the two can write into a tensor, so that one of them may
        move to the place of the other."""
        harmless = (operator.getitem, entered, pooled)
        return all(n in self.parts or n.target in harmless for n in between(first, last))


def _terms(node: fx.Node) -> bool:
    """Return whether a sum has two different nodes as terms and nothing else."""
    return (
        len(node.args) == 2
        and not node.kwargs
        and all(isinstance(a, fx.Node) for a in node.args)
        and node.args[0] is not node.args[1]
    )


def _after(node: fx.Node) -> list[fx.Node]:
    found = []
    while (node := node.next).op != "root":
        found.append(node)
    return found


def _slope(node: fx.Node, layer: nn.Module | None) -> float | None:
    """Return the slope below zero of a ReLU or LeakyReLU; None for other nodes."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if is_relu(node, layer):
        return 0.0
    slope: Any = None
    if type(layer) is nn.LeakyReLU:
        slope = layer.negative_slope
    elif node.target in (F.leaky_relu, F.leaky_relu_):
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    right = isinstance(slope, (int, float)) and 0 <= slope < 1
    return float(slope) if right else None


def _global_mean(node: fx.Node, layer: nn.Module | None) -> tuple[Any, bool] | None:
    """Return the dimensions of a mean over height and width, and whether it keeps them; None for
    other nodes."""
    args = node.args
    if not args or not isinstance(args[0], fx.Node):
        return None
    one, pixels = (1, (1, 1), [1, 1]), ([-2, -1], [2, 3])
    if type(layer) is nn.AdaptiveAvgPool2d:
        return ([-2, -1], True) if layer.output_size in one else None
    if node.target is F.adaptive_avg_pool2d:
        size = args[1] if len(args) > 1 else node.kwargs.get("output_size")
        return ([-2, -1], True) if size in one else None
    if node.target is torch.mean or (node.op, node.target) == ("call_method", "mean"):
        more = dict(zip(("dim", "keepdim"), args[1:], strict=False)) | dict(node.kwargs)
        dims, keepdim = more.pop("dim", None), more.pop("keepdim", False)
        if isinstance(dims, (list, tuple)) and list(dims) in (*pixels, *(p[::-1] for p in pixels)):
            return (list(dims), keepdim) if isinstance(keepdim, bool) and not more else None
    return None


def _flattens(node: fx.Node, layer: nn.Module | None) -> bool:
    """Return whether a node makes one dimension of all but the first."""
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op, node.target) == ("call_method", "flatten"):
        return node.args[1:] == (1,) and not node.kwargs
    if (node.op, node.target) == ("call_method", "reshape") and len(node.args) == 3:
        image, rows, rest = node.args
        if isinstance(image, fx.Node) and isinstance(rows, fx.Node):
            return isinstance(rest, int) and rest == -1 and _is_batch_size(rows, image)
    return False


def _is_batch_size(node: fx.Node, image: fx.Node) -> bool:
    if (node.op, node.target) == ("call_method", "size"):
        return node.args == (image, 0)
    shape = node.args[0] if node.target is operator.getitem and node.args[1:] == (0,) else None
    if not isinstance(shape, fx.Node):
        return False
    return (shape.target is getattr and shape.args == (image, "shape")) or (
        (shape.op, shape.target) == ("call_method", "size") and shape.args == (image,)
    )


def _are_sizes(args: tuple[Any, ...]) -> bool:
    return bool(args) and all(type(a) in (int, fx.Node, tuple, list) for a in args)
