"""Training settings as a TOML file, JSON or the command line would give them. A Config must read
back as it was written, or the error must name the setting, and a misspelt one the nearest."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from fuzz.case import REFUSED, RIGHT, Draw, Finding, require_clear
from pyadv.data import ImageData
from pyadv.training import Config
from pyadv.training.methods import METHODS
from pyadv.training.schedules import SCHEDULES, lr_factor

_FIELDS = {f.name: str(f.type) for f in dataclasses.fields(Config)}


def case(draw: Draw) -> str:
    values = _legal(draw)
    wrong: list[str] = []
    if draw.chance(0.5):
        wrong.append(_spoil(draw, values))
    draw.note(what="Config", values=values, wrong=wrong)
    before = json.dumps(values, sort_keys=True, default=repr)
    try:
        config = Config.from_dict(values)
        resolved = config.resolve(_images(draw))
        _check(config, resolved)
    except Finding:
        raise
    except Exception as error:
        if json.dumps(values, sort_keys=True, default=repr) != before:
            raise Finding("changed the dictionary") from error
        if not wrong:
            # Settings that exclude each other, such as tau without a friendly method.
            return require_clear(error, [*values, "method"], "refused legal settings: ")
        require_clear(error, [*wrong, *values] if wrong[0] in _FIELDS else wrong)
        if wrong[0] not in _FIELDS and wrong[0][:-1] in _FIELDS and wrong[0][:-1] not in str(error):
            raise Finding(f"does not say that {wrong[0]} may be {wrong[0][:-1]}") from error
        return REFUSED
    if wrong and wrong[0] not in _FIELDS:
        raise Finding(f"took the unknown setting {wrong[0]}")
    return RIGHT


def _check(config: Config, resolved: Config) -> None:
    """Types, and what is saved reads back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        resolved.save(file)
        if Config.from_dict(json.loads(file.read_text())) != resolved:
            raise Finding("what is saved does not read back")
    for name, kind in _FIELDS.items():
        value = getattr(resolved, name)
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number) and name != "gairat_lam":
                raise Finding(f"{name} is {number} without an error")
        if isinstance(value, bool) and "bool" not in kind:
            raise Finding(f"{name} is {value!r} without an error")
    for share in (0.0, 0.5, 1.0):
        plan = resolved.schedule, share, tuple(resolved.milestones), tuple(resolved.factors)
        if not 0 <= lr_factor(*plan) <= 1:
            raise Finding(f"the learning rate is {lr_factor(*plan)} times its peak at {share}")


def _images(draw: Draw) -> ImageData:
    name, channels = draw.choice((("fashion-mini", 1), ("mnist", 1), ("svhn", 3), ("other", 3)))
    x, y = torch.zeros(4, channels, 8, 8), torch.tensor([0, 1, 0, 1])
    return ImageData(name, ("a", "b"), x, y, x, y)


def _legal(draw: Draw) -> dict[str, Any]:
    method = draw.choice(list(METHODS))
    options: dict[str, tuple[Any, ...]] = {
        "norm": ("Linf", "l2", "inf"),
        "eps": (0.1, "8/255", 1, "0.3"),
        "alpha": (0.01, "2/255", None),
        "steps": (1, 7, 10),
        "start": ("keyed", "uniform", "none"),
        "eps_warmup": (0, 3, None),
        "epochs": (1, 5, 30),
        "batch_size": (1, 128),
        "lr": (0.1, "1/100", 1),
        "schedule": tuple(SCHEDULES),
        "milestones": ([0.5, 0.75], ["1/2"], [0.1, 0.2, 0.9], None),
        "momentum": (0.9, 0),
        "weight_decay": (0, 5e-4),
        "augment": (True, False),
        "val": (0, 2),
        "seed": (0, 2**31 - 1),
        "precision": ("fp32", "bf16"),
        "channels_last": (True, False),
        "emr": (0.0, 0.1),
        "emr_milestones": ([], [0.5]),
        "norm_penalty": (0, 0.01),
        "awp": (0.0, 0.01),
        "ema": (0, 0.99),
        "beta": (6.0, 1),
        "tau": (0, 2),
        "begin_epoch": (1, 2),
        "gairat_lam": (-1.0, 0),
        "mail_margin": ("adv", "nat"),
    }
    values: dict[str, Any] = {"method": method, "eps": 0.1}
    for name in draw.sample(sorted(options), draw.choice((0, 2, 5))):
        if name in ("beta", "tau", "begin_epoch", "gairat_lam", "mail_margin") and (
            name not in METHODS[method].settings
        ):
            continue
        values[name] = draw.choice(options[name])
    return values


def _spoil(draw: Draw, values: dict[str, Any]) -> str:
    if draw.chance(0.25):
        name = draw.choice([*(f + "z" for f in _FIELDS), "optimizer", "", "Eps", "data set"])
        values[name] = 1
        return name
    name = draw.choice(list(_FIELDS))
    values[name] = draw.choice(
        (
            *(None, "", "x", "8/0", "nan", "inf", math.nan, math.inf, -math.inf, -1, -0.5),
            *(0, True, 2**70, 10**400, 1.5, [], [1], ["a"], [math.nan], {}, {"a": 1}, [[0.5]]),
            *("1e400", "0x10", "١", "8/255/2", " 0.1 ", object(), [75, 90], [0.9, 0.1], [-1]),
        )
    )
    return name
