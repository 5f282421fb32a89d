"""What a training run is: every setting, and every default, in one place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyadv.attacks._checks import canonical_norm
from pyadv.data import ImageData
from pyadv.training.schedules import SCHEDULES

METHODS = ("standard", "at", "fat", "gairat")
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's

# What follows from the data set: for Linf, with alpha = eps / 4.
_GREY = {
    "model": "small-cnn",
    "eps": 0.1,
    "epochs": 10,
    "lr": 0.1,
    "schedule": "cyclic",
    "augment": False,
}
_DIGITS = {**_GREY, "eps": 0.3, "epochs": 20, "eps_warmup": 5}  # without it the loss stays at ln 10
_COLOUR = {  # Pang et al. (2021), "Bag of Tricks for Adversarial Training"
    "model": "preact-resnet-18",
    "eps": 8 / 255,
    "epochs": 110,
    "lr": 0.1,
    "schedule": "piecewise",
    "milestones": (100 / 110, 105 / 110),
    "augment": True,
}
_BY_NAME = {"mnist": _DIGITS, "kmnist": _DIGITS, "svhn": {**_COLOUR, "lr": 0.01, "augment": False}}


@dataclass
class Config:
    """Settings of a run. Those that are None follow from the data set, see `resolve`.

    Epochs count from 1. `eps`, `alpha` are in units of the pixels, which lie in [0, 1].
    """

    method: str = "at"
    data: str = "fashion-mini"
    model: str | None = None

    norm: str = "Linf"
    eps: float | None = None
    alpha: float | None = None  # None: eps / 4
    steps: int = 10
    eps_warmup: int | None = None  # epochs over which eps and alpha grow linearly to their values

    epochs: int | None = None
    batch_size: int = 128
    lr: float | None = None
    schedule: str | None = None
    milestones: tuple[float, ...] | None = None  # of "piecewise": shares of the run
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool | None = None  # random crop with a border of 4, and flip
    val: int = 0  # training images held out; best.pt is then the epoch most robust on them
    seed: int = 0
    precision: str = "fp32"

    emr: float = 0.0  # lam of effective margin regularisation (per-sample mean), 0: without
    emr_temperature: float = 40.0
    tau: int | None = None  # FAT; None: the official 0, 1, 2 over the run
    gairat_lam: float = -1.0
    begin_epoch: int | None = None  # GAIRAT's first weighted epoch; None: after 0.3 of the run

    def resolve(self, data: ImageData) -> Config:
        """A copy in which nothing is None but tau; raises ValueError where a setting is wrong.

        Sets known by name have their own defaults; others get those of Fashion-MNIST if they are
        grey, of CIFAR-10 if they have colour. Radii are known for Linf only: with another norm
        `eps` must be given.
        """
        known = _BY_NAME.get(data.name, _GREY if data.shape[0] == 1 else _COLOUR)
        norm = canonical_norm(self.norm)
        if norm != "Linf" and self.eps is None:
            raise ValueError(f"eps must be given for norm {norm}: the default is for Linf")
        config = dataclasses.replace(self, norm=norm)
        for name, value in {"eps_warmup": 0, "milestones": (0.5, 0.75), **known}.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        config.milestones = tuple(config.milestones)  # JSON brings a list
        if config.alpha is None:
            config.alpha = config.eps / 4
        if config.begin_epoch is None:
            config.begin_epoch = int(0.3 * config.epochs) + 1
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError unless every setting is in range (settings of attacks, models and data
        are checked where they are used)."""
        for name, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        rules = (
            (("epochs", "batch_size", "begin_epoch"), lambda v: v >= 1, ">= 1"),
            (("eps_warmup", "val", "weight_decay", "emr"), lambda v: v >= 0, ">= 0"),
            (("lr",), lambda v: v > 0, "> 0"),
            (("momentum",), lambda v: 0 <= v < 1, "in [0, 1)"),
            (("seed",), lambda v: 0 <= v < 2**31, "in [0, 2^31)"),
        )
        for names, holds, rule in rules:
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Raises ValueError for a setting that does not exist."""
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(values) - names:
            raise ValueError(f"config has unknown settings {sorted(unknown)}")
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
