"""Build the parts of a run from its settings: architecture, device, objective."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyadv import models
from pyadv._names import did_you_mean
from pyadv.data import Images, Plan, load, transformed_batches
from pyadv.menus import Derivative
from pyadv.objectives import AWP, EMR, NormPenalty, Objective
from pyadv.objectives.step import Schedule
from pyadv.ops import NormProduct
from pyadv.passes.borrow import borrowed, is_sharded
from pyadv.training.config import Config, Resolved
from pyadv.training.loaders import Loaders
from pyadv.training.methods import METHODS
from pyadv.training.schedules import lr_factor

_LOG = logging.getLogger("pyadv")


def data(config: Config) -> Images:
    """Return the data set that a config names."""
    return load(
        config.data,
        image_size=config.image_size,
        stream=config.stream,
        workers=config.workers,
        whole_images=config.transform is not None,
    )


def batches(config: Config, data: Images, ids: Tensor, **place: Any) -> Plan:
    """Return the training batches of the samples `ids`; `place` is their device and the number of
    this process, see `Plan`.
    """
    settings = {"ids": ids, "seed": config.seed, "augment": config.augment, **place}
    if config.transform is None:
        return data.batches(config.batch_size, **settings)
    return transformed_batches(
        data,
        config.batch_size,
        transform=config.transform,
        workers=config.workers,
        **settings,
    )


def chunk(data: Images | Loaders) -> int:
    """Return how many samples an evaluation holds in memory at a time: at most 1 GB of images."""
    return max(1, min(4096, 10**9 // (4 * math.prod(data.shape))))


def architecture(config: Config, data: Images | Loaders) -> dict[str, Any]:
    """Return the arguments of `pyadv.models.create`; checkpoints store them with the weights.

    They do not say where training takes its first weights from: a trained network has its own.
    """
    channels, *size = data.shape
    result = {
        "name": config.model,
        "in_channels": channels,
        "num_classes": len(data.classes),
        "image_size": tuple(size),
    }
    args = config.model_args
    if _is_of_timm(config):
        args = {k: v for k, v in args.items() if k not in _FIRST_WEIGHTS}
    optional = {"args": args, "mean": config.mean, "std": config.std}
    return result | {name: value for name, value in optional.items() if value}


def network(config: Resolved, architecture: dict[str, Any], *, fresh: bool) -> nn.Module:
    """Return the network of a run that begins (`fresh`), with the weights it starts from, or that
    is resumed.

    Raises:
        ValueError: as `pyadv.models.create` and `pyadv.models.check_restorable` do.
    """
    models.check_restorable(config.model)
    begin = {"args": config.model_args, "weights": config.weights} if fresh else {}
    return models.create(**architecture | begin)


def _is_of_timm(config: Config) -> bool:
    return config.model is not None and config.model.startswith("timm:")


def trained_network(config: Config, data: Images) -> nn.Module:
    """Return the trained network that the network's settings of `config` name, in eval mode.

    `config` need not be resolved.

    Raises:
        ValueError: as `pyadv.models.create` does, and if the network would have fresh weights.
    """
    fresh = config.weights is None and not any(map(config.model_args.get, _FIRST_WEIGHTS))
    timm = _is_of_timm(config)
    if fresh and (timm or config.model in models.MODELS):
        also = ", or model_args pretrained=true" if timm else ""
        raise ValueError(f"model {config.model!r} is untrained: give a file of weights{also}")
    trained = {"args": config.model_args, "weights": config.weights, "new_head": False}
    return models.create(**architecture(config, data) | trained).eval()


def own_network(config: Config, model: nn.Module, data: Images | Loaders) -> nn.Module:
    """Return the user's network such that it takes images in [0, 1] and returns logits."""
    model = models.returning_logits("model", model, len(data.classes), data.shape)
    if config.mean is None or config.std is None:
        return model
    return models.Normalized(model, config.mean, config.std)


def optimizer(config: Config, model: nn.Module) -> Optimizer:
    """Return the optimizer that a config names."""
    if config.lr is None:
        raise ValueError("lr must be a number, got None: config must be resolved")
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum, weight_decay=decay)


_FIRST_WEIGHTS = ("pretrained", "checkpoint_path")  # arguments of timm


def device(name: str | None) -> torch.device:
    """Return the device called `name` ("cpu", "cuda", "cuda:1"), by default CUDA if available.

    Raises ValueError for another name and for a CUDA device that does not exist.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu"] + ["cuda"] * (cards > 0) + [f"cuda:{i}" for i in range(cards)]
    if name is None:
        return torch.device("cuda" if cards else "cpu")
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"device must be one of {', '.join(known)}, got {name!r}{hint}")
    return torch.device(name)


def objective(
    config: Resolved, model: nn.Module, data: Images | Loaders, derivative: Derivative | None = None
) -> Objective:
    """Return the objective of a resolved `config`: its method and the terms added to it.

    Args:
        config: settings.
        model: the network of the run; the norm penalty reads its layers.
        data: the data of the run, whose images have the shape that the norm penalty needs.
        derivative: the form of EMR, by default `emr_derivative(model, data)`.
    """
    result = METHODS[config.method].build(config.to_dict())
    if config.emr:
        derivative = derivative or emr_derivative(model, data)
        result = result + EMR(
            lam=_emr_lam(config), temperature=config.emr_temperature, derivative=derivative
        )
    if config.norm_penalty:
        result = result + NormPenalty(config.norm_penalty, NormProduct(model, data.shape))
    if config.awp:
        result = AWP(result, config.awp, config.awp_begin_epoch)
    return result


def emr_derivative(model: nn.Module, data: Images | Loaders) -> Derivative:
    """Return the form of EMR that the network allows: "tangent", which needs second derivatives, or
    "difference".

    The fused attention of PyTorch, for example, has no second derivative. One image goes through
    the network in eval mode. FSDP frees the gathered weights within a backward pass, which a
    second derivative would need.
    """
    if is_sharded(model):
        return "difference"
    parameters = [p for p in model.parameters() if p.requires_grad]
    like = parameters[0]
    with borrowed(model), torch.enable_grad():
        x = torch.full(
            (1, *data.shape), 0.5, device=like.device, dtype=like.dtype, requires_grad=True
        )
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        try:
            torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)
        except RuntimeError as error:  # NotImplementedError is one
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise  # a lack of memory says nothing about the network
            _LOG.info("EMR takes finite differences, since a second derivative failed: %s", error)
            return "difference"
    return "tangent"


def _emr_lam(config: Resolved) -> Schedule:
    if not config.emr_milestones:
        return config.emr
    return lambda epoch: (
        config.emr * lr_factor("piecewise", (epoch - 1) / config.epochs, config.emr_milestones)
    )
