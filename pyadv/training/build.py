"""From settings to the parts of a run: attack, objective, model."""

from __future__ import annotations

from typing import Any

import torch

from pyadv.attacks import PGD, FriendlyPGD
from pyadv.data import ImageData
from pyadv.objectives import AT, EMR, FAT, GAIRAT, Objective, Standard, fat_tau
from pyadv.training.config import Config

_FAT_EPOCHS = 120  # the length fat_tau is written for


def architecture(config: Config, data: ImageData) -> dict[str, Any]:
    """Arguments of `pyadv.models.create`; they stand in the checkpoint beside the weights."""
    channels, *size = data.shape
    return {
        "name": config.model,
        "in_channels": channels,
        "num_classes": len(data.classes),
        "image_size": tuple(size),
    }


def device(name: str | None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1"); None: CUDA if it is there.

    Raises ValueError for another name, or for a CUDA device that is not there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu"] + ["cuda"] * (cards > 0) + [f"cuda:{i}" for i in range(cards)]
    if name is None:
        return torch.device("cuda" if cards else "cpu")
    if name not in known:
        raise ValueError(f"device must be one of {', '.join(known)}, got {name!r}")
    return torch.device(name)


def objective(config: Config) -> Objective:
    """What a resolved `config` minimises."""
    settings = {
        "norm": config.norm,
        "eps": config.eps,
        "alpha": config.alpha,
        "steps": config.steps,
        "seed": config.seed,
    }
    if config.method == "standard":
        result = Standard()
    elif config.method == "at":
        result = AT(PGD(**settings))
    elif config.method == "fat":
        tau = config.tau if config.tau is not None else _stretched_tau(config.epochs)
        result = FAT(FriendlyPGD(omega=0.001, **settings), tau=tau)
    else:
        result = GAIRAT(PGD(**settings), lam=config.gairat_lam, begin_epoch=config.begin_epoch)
    if config.emr:
        result = result + EMR(lam=config.emr, temperature=config.emr_temperature)
    return result


def _stretched_tau(epochs: int):
    """FAT's official schedule, stretched over `epochs`."""
    return lambda epoch: fat_tau(max(1, round(epoch * _FAT_EPOCHS / epochs)))
