"""Shard a network over the processes (FSDP2), and convert states between shards and whole tensors.

A checkpoint holds whole tensors, so any number of processes can continue from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(model: nn.Module, device: str) -> None:
    """Shard the parameters of a network over all processes, in place, and move them to the devices.

    `device` is their type, "cpu" or "cuda". No device holds the whole network.

    The blocks of the outermost `nn.Sequential` and `nn.ModuleList` are gathered one at a time, the
    rest of the network together. An optimizer must be made afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(module, nn.Sequential | nn.ModuleList):
            found += [child] if not isinstance(child, nn.Sequential) else _blocks(child)
        else:
            found += _blocks(child)
    return found


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of process 0, as DistributedDataParallel does.

    The processes would otherwise attack different networks. All must call this together.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def whole(value: Any) -> Any:
    """Return a state in which the shards are gathered to whole tensors on the CPU.

    All processes must call this together.
    """
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    full = getattr(value, "full_tensor", None)
    return full().cpu() if full is not None else value


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a sharded network."""
    own = model.state_dict()
    model.load_state_dict({key: _like(value, own.get(key)) for key, value in state.items()})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the whole state of an optimizer into one of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {
        i: {name: _like(value, parameters[i]) for name, value in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": kept})


def _like(value: Any, shards: Any) -> Any:
    """Shard a whole tensor as `shards` is, if it has the same shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(shards, DTensor) or getattr(value, "shape", None) != shards.shape:
        return value
    return distribute_tensor(value.to(shards.device), shards.device_mesh, shards.placements)
