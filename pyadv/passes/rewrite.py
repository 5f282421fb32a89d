"""Rewriting the torch.fx graph of a network so that a pass through it costs less.

- BatchNorm in evaluation mode is a multiplication and an addition, which go into the weights of the
  convolution before it; where there is none, BatchNorm becomes one operation.
- A ReLU writes over its input where nothing else reads that input.
- Sums and ReLUs that follow one of Winograd's convolutions become part of its pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyadv.passes.layers import AffineLayer, WeightedLayer, is_affine, is_weighted, takes

Part = WeightedLayer | AffineLayer


class Network(nn.Module):
    """A rewritten network: Python code that fx generated, and the layers and tensors it names.

    An `fx.GraphModule` refers to itself through its graph, so that only the cyclic collector frees
    its weights. This module keeps the code and drops the graph.
    """

    def __init__(self, graph: fx.Graph, held: dict[str, Any]):
        super().__init__()
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        generated = graph.python_code("self")
        self.code = generated.src
        names = dict(generated.globals)
        exec(compile(self.code, "<pyadv fast view>", "exec"), names)
        self._run: Callable[..., Any] = names.pop("forward")  # popped: no cycle with its globals

    def forward(self, *args: Any) -> Any:
        return self._run(self, *args)


def rewrite(graph: fx.Graph, held: dict[str, Any]) -> tuple[Network, list[Part]]:
    """Return the rewritten network and its parts, the layers that replace the model's.

    Args:
        graph: what the model computes; changed in place.
        held: the model's layer or tensor for each target that the graph names.
    """
    parts: dict[fx.Node, Part] = {}
    for node in list(graph.nodes):
        layer = held[node.target] if node.op == "call_module" else None
        before = first_input(node)
        if is_weighted(layer):
            parts[node] = WeightedLayer(layer)
        elif is_affine(layer):
            conv = parts.get(before) if is_alone(before) else None
            if before is not None and isinstance(conv, WeightedLayer) and takes(conv, layer):
                conv.norm = (layer,)
                node.replace_all_uses_with(before)
                graph.erase_node(node)
            else:
                parts[node] = AffineLayer(layer)
        elif is_relu(node, layer) and is_alone(before) and (before in parts or is_sum(before)):
            with graph.inserting_before(node):  # no backward pass reads what it overwrites
                node.replace_all_uses_with(graph.call_function(torch.relu_, (before,)))
            graph.erase_node(node)
    _fuse(graph, parts)
    return Network(graph, renamed(graph, held, parts)), list(parts.values())


def renamed(
    graph: fx.Graph, held: dict[str, Any], parts: Mapping[fx.Node, nn.Module]
) -> dict[str, Any]:
    """Give every layer and tensor that the graph uses a name without dots."""
    names: dict[str, str] = {}
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node in parts:
            node.target = f"part_{len(found)}"
            found[node.target] = parts[node]
        elif node.op in ("call_module", "get_attr"):
            value = held[node.target]
            node.target = names.setdefault(node.target, f"held_{len(found)}")
            found[node.target] = value
    return found


def _fuse(graph: fx.Graph, parts: dict[fx.Node, Part]) -> None:
    """Make sums and ReLUs that follow Winograd's convolutions part of these."""
    winograd = {n: p for n, p in parts.items() if isinstance(p, WeightedLayer) and p.winograd}
    for node in [n for n in graph.nodes if is_sum(n) and len(n.args) == 2 and not n.kwargs]:
        for conv, other in (node.args, node.args[::-1]):
            if (
                conv in winograd
                and conv is not other
                and isinstance(other, fx.Node)
                and (len(conv.users), len(conv.args), conv.kwargs) == (1, 1, {})
                and all(n in parts for n in between(conv, node))  # nothing written in place
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
        readers = [winograd[user] for user in node.users if user in winograd]
        if part.relu and inputs and len(readers) == len(node.users):
            part.readers_mask = True
            for reader in readers:
                reader.source = (part,)


def first_input(node: fx.Node) -> fx.Node | None:
    """Return the first argument of the node, if it is a node."""
    before = node.args[0] if node.args else None
    return before if isinstance(before, fx.Node) else None


def is_alone(node: fx.Node | None) -> TypeGuard[fx.Node]:
    """Return whether there is a node and it has one reader."""
    return node is not None and len(node.users) == 1


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes after `first` and before `last`."""
    while (first := first.next) is not last:
        yield first


def is_relu(node: fx.Node, layer: nn.Module | None) -> bool:
    """Return whether the node, which calls `layer` if it calls one, is a ReLU."""
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return type(layer) is nn.ReLU or (
        node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_)
    )


def is_sum(node: fx.Node) -> bool:
    """Return whether the node is a sum."""
    return node.op == "call_function" and node.target in (operator.add, torch.add)
