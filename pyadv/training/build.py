"""Build the parts of a run from its settings: architecture, device, objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyadv._names import did_you_mean
from pyadv.data import ImageData
from pyadv.objectives import AWP, EMR, NormPenalty, Objective
from pyadv.objectives.step import Schedule
from pyadv.ops import NormProduct
from pyadv.training.config import Config
from pyadv.training.methods import METHODS
from pyadv.training.schedules import lr_factor


def architecture(config: Config, data: ImageData) -> dict[str, Any]:
    """Return the arguments of `pyadv.models.create`; checkpoints store them with the weights."""
    channels, *size = data.shape
    return {
        "name": config.model,
        "in_channels": channels,
        "num_classes": len(data.classes),
        "image_size": tuple(size),
    }


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


def objective(config: Config, model: nn.Module, data: ImageData) -> Objective:
    """Return the objective of a resolved `config`: its method and the terms added to it.

    `model` and `data` are those of the run; the norm penalty reads the layers and their shapes.
    """
    result = METHODS[config.method].build(config.to_dict())
    if config.emr:
        result = result + EMR(lam=_emr_lam(config), temperature=config.emr_temperature)
    if config.norm_penalty:
        result = result + NormPenalty(config.norm_penalty, NormProduct(model, data.shape))
    if config.awp:
        result = AWP(result, config.awp, config.awp_begin_epoch)
    return result


def _emr_lam(config: Config) -> Schedule:
    if not config.emr_milestones:
        return config.emr
    return lambda epoch: (
        config.emr * lr_factor("piecewise", (epoch - 1) / config.epochs, config.emr_milestones)
    )
