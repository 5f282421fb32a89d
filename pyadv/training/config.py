"""The settings of a training run, with every default and every rule."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pyadv import _state
from pyadv._names import did_you_mean
from pyadv.engine.checks import canonical_norm
from pyadv.engine.task import step_size
from pyadv.menus import LossName, Norm, Speed, StartName
from pyadv.training.methods import METHOD_SETTINGS, METHODS
from pyadv.training.schedules import SCHEDULES, ScheduleName

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, str] = {  # to Accelerate's names
    "fp32": "no",
    "bf16": "bf16",
    "fp16": "fp16",
}

OPTIMIZERS = ("sgd", "adamw")

_C = TypeVar("_C", bound="Config")

# Defaults that follow from the data set, for Linf.
_GREY = {
    "model": "small-cnn",
    "eps": 0.1,
    "epochs": 10,
    "lr": 0.1,
    "schedule": "cyclic",
    "augment": False,
}
# Without the warm-up the loss stays at ln 10.
_DIGITS = {**_GREY, "eps": 0.3, "epochs": 20, "eps_warmup": 5}
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


class Described(Protocol):
    """What the defaults of a run follow from: a data set, or the user's loaders."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...


@dataclass
class Config:
    """Settings of a run. Those that are None follow from the data set or the method: see
    `resolve`.

    Epochs count from 1. `eps` and `alpha` are in units of the pixels, which lie in [0, 1].
    """

    method: str = "at"  # a key of METHODS, which has the defaults of the methods' own settings
    data: str = "fashion-mini"  # a source that `pyadv.data.load` knows
    image_size: int | None = None  # to which images in files are resized and cut
    stream: bool | None = None  # read images batch by batch; None: where they do not fit memory
    workers: int | None = None  # processes that read and transform; None: one per core, at most 8
    transform: str | None = None  # augmentation by the workers, see `data.streams.find_transform`
    model: str | None = None  # a name that `pyadv.models.create` knows
    # keyword arguments of the network
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None  # file of weights that training starts from
    mean: tuple[float, ...] | None = None  # of the pixels, inside the network; with std
    std: tuple[float, ...] | None = None

    norm: Norm = "Linf"
    eps: float | None = None
    alpha: float | None = None  # None: follows eps, norm and steps, see `step_size`
    steps: int = 10
    start: StartName = "keyed"  # of the attack
    attack_loss: LossName | None = None  # loss that the attack increases
    speed: Speed = "fast"  # of the attack, see PGD
    eps_warmup: int | None = None  # epochs over which eps and alpha grow linearly to their values

    epochs: int | None = None
    batch_size: int = 128  # of one update of the weights
    accumulate: int = 1  # parts in which a batch goes through the network, to save memory
    optimizer: str = "sgd"  # sgd or adamw
    clip: float = 0.0  # largest norm of the gradient; 0: no limit
    lr: float | None = None
    schedule: ScheduleName | None = None
    milestones: tuple[float, ...] | None = None  # of "piecewise", as shares of the run
    factors: tuple[float, ...] = ()  # factor of lr from each milestone on; (): 0.1, 0.01, ...
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool | None = None  # random crop with a border of an eighth, and flip
    val: int = 0  # training images held out; best.pt is the epoch most robust on them
    seed: int = 0
    precision: Precision = "fp32"
    log_with: str | None = None  # trackers of Accelerate; None: tensorboard if it is installed
    fsdp: bool = False  # shard weights, gradients and the optimizer's state over the processes
    channels_last: bool = False  # memory order of images and weights; fast in 16 bits on GPUs

    # A strength of 0 switches each of these off.
    emr: float = 0.0  # lam of effective margin regularisation (per-sample mean)
    emr_temperature: float = 40.0
    emr_milestones: tuple[float, ...] = ()  # shares of the run at which lam falls to a tenth
    norm_penalty: float = 0.0  # lam of the log-product of the layers' Frobenius norms
    awp: float = 0.0  # gamma of adversarial weight perturbation
    awp_begin_epoch: int = 1
    ema: float = 0.0  # decay per step of the weight average that is evaluated

    beta: float | None = None  # weight of the KL term of TRADES, MART and their relatives
    tau: int | None = None  # of friendly attacks; None: the official schedule over the run
    begin_epoch: int | None = None  # first epoch with instance weights
    gairat_lam: float | None = None
    mail_margin: str | None = None
    mail_slope: float | None = None
    mail_bias: float | None = None
    mail_normalize: str | None = None

    def resolve(self, data: Described) -> Resolved:
        """Return a checked copy with all defaults filled in.

        Settings that the method does not have stay None, and so does tau for the official schedule.
        Some data sets have defaults of their own; other grey images get those of Fashion-MNIST,
        other colour images those of CIFAR-10. The default of `eps` is for Linf: with another norm
        `eps` must be given. Numbers of NumPy become Python's.

        Raises ValueError if a setting is wrong.
        """
        known = _BY_NAME.get(data.name, _GREY if data.shape[0] == 1 else _COLOUR)
        norm = canonical_norm(self.norm)
        if norm != "Linf" and self.eps is None:
            raise ValueError(f"eps must be given for norm {norm}: the default is for Linf")
        config = Config.from_dict({**self.to_dict(), "norm": norm})
        if config.lr is None and config.optimizer == "adamw":
            config.lr = 1e-3
        if config.augment is None and config.transform is not None:
            config.augment = False
        for name, value in {"eps_warmup": 0, "milestones": (0.5, 0.75), **known}.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        config.check()
        resolved = Resolved.from_dict(config.to_dict())
        if config.alpha is None:
            resolved.alpha = float(step_size(resolved.eps, norm, resolved.steps))
        for name, value in METHODS[resolved.method].resolved(resolved.epochs).items():
            if getattr(resolved, name) is None:
                setattr(resolved, name, value)
        return resolved

    def check(self) -> None:
        """Raise ValueError if a setting is out of range.

        Building the attack, the model and the batches checks the settings they use.
        """
        for name, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}"
                    f"{did_you_mean(value, choices)}"
                )
        for name in ("eps", "alpha", "emr_temperature", "gairat_lam", "mail_slope", "mail_bias"):
            value = getattr(self, name)
            equal_weights = name == "gairat_lam" and value == math.inf
            if value is not None and not (math.isfinite(value) or equal_weights):
                raise ValueError(f"{name} must be finite, got {value}")
        has = METHODS[self.method].settings
        for name in METHOD_SETTINGS:
            if getattr(self, name) is not None and name not in has:
                those = ", ".join(m for m, method in METHODS.items() if name in method.settings)
                raise ValueError(f"{name} is for the methods {those}, got method {self.method!r}")
        for names, holds, rule in _RULES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name} must be {rule}, got {value}")
        if self.fsdp:
            self._check_fsdp()
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std must go together, got mean={self.mean}, std={self.std}")
        for name in ("milestones", "emr_milestones"):
            _check_milestones(name, getattr(self, name) or ())
        begin, epochs = self.begin_epoch, self.epochs
        if begin is not None and epochs is not None and begin > epochs:
            raise ValueError(
                f"begin_epoch must be <= epochs, or no weight would ever count, got "
                f"{begin} and {epochs}"
            )
        milestones = self.milestones or ()
        if self.factors and len(self.factors) != len(milestones):
            raise ValueError(
                f"factors must be as many as milestones, got {len(self.factors)} and "
                f"{len(milestones)}"
            )
        if bad := [f for f in self.factors if not 0 <= f <= 1]:
            raise ValueError(f"factors must be shares of lr in [0, 1], got {bad[0]}")

    def _check_fsdp(self) -> None:
        """Raise ValueError for a setting that needs whole weights, or that lets the processes make
        different numbers of passes."""
        for name, without in (("ema", 0), ("awp", 0), ("norm_penalty", 0), ("accumulate", 1)):
            value = getattr(self, name)
            if value != without:
                raise ValueError(f"fsdp does not go with {name}, got {name}={value}")
        if self.precision == "fp16":
            raise ValueError("fsdp needs precision fp32 or bf16, got fp16")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_C], values: dict[str, Any]) -> _C:
        """Make a Config of plain values, as JSON, TOML and the command line have them.

        Numbers may be fractions in text ("8/255"). Raises ValueError for a setting that does not
        exist or has the wrong type. A "provenance", as config.json has it, is left out.
        """
        values = {name: value for name, value in values.items() if name != "provenance"}
        types = get_type_hints(cls)
        if unknown := sorted(str(name) for name in values if name not in types):
            hint = "".join(did_you_mean(name, types) for name in unknown)
            raise ValueError(f"config has unknown settings {unknown}{hint}")
        return cls(**{name: _read(name, value, types[name]) for name, value in values.items()})

    def save(self, path: Path, provenance: dict[str, Any] | None = None) -> None:
        """Write the settings as JSON, with where the run comes from."""
        content = self.to_dict() | ({} if provenance is None else {"provenance": provenance})
        text = json.dumps(content, indent=2) + "\n"
        _state.write(path, lambda file: file.write(text.encode()))


if TYPE_CHECKING:

    class Resolved(Config):
        """The settings of a run as `Config.resolve` returns them: these are known."""

        model: str
        eps: float
        alpha: float
        eps_warmup: int
        epochs: int
        augment: bool

else:
    Resolved = Config  # one class at run time, so that equal settings compare as equal


def number(value: Any) -> float:
    """Return a number that is given as such, as text or as a fraction: 0.1, "0.1", "8/255".

    Raises ValueError for anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(Fraction(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, RuntimeError):
        raise ValueError(f"{value!r} is not a number or a fraction like 8/255") from None


def arguments(value: Any) -> dict[str, Any]:
    """Return keyword arguments that are given as a dict, as JSON, or as text "depth=10,act=gelu".

    Values in text are read as Python literals or JSON where they are such, and as text otherwise.

    Raises:
        ValueError: if the value is neither, or if JSON cannot hold what is in it.
    """
    if isinstance(value, str):
        value = _json(value) if value.lstrip().startswith("{") else _pairs(value)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{value!r} is not a dict, JSON or name=value,name=value")
    try:
        return json.loads(json.dumps(dict(value)))  # a copy, as it reads back from a file
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} cannot be written as JSON: {error}") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None


def _pairs(text: str) -> dict[str, Any]:
    # A comma separates arguments only where a name and "=" follow: values may be lists.
    parts = [part for part in re.split(r",\s*(?=[^\W\d]\w*\s*=)", text) if part.strip()]
    pairs = [part.partition("=") for part in parts]
    if bad := [name for name, sign, _ in pairs if not sign or not name.strip().isidentifier()]:
        raise ValueError(f"{bad[0]!r} is not name=value")
    return {name.strip(): _literal(value.strip()) for name, _, value in pairs}


def _literal(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def _read(name: str, value: Any, type_: Any) -> Any:
    """Return `value` as the type of its field, such as `float | None`.

    Any text passes as the type of a menu: whoever uses the setting checks it.
    """
    types = get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,)
    if value is None and type(None) in types:
        return None
    origin = get_origin(types[0]) or types[0]
    kind = "str" if origin is Literal else origin.__name__
    try:
        if kind == "float":
            return number(value)
        if kind == "dict":
            return arguments(value)
        if kind == "tuple":
            if isinstance(value, str):  # its characters could be numbers
                raise ValueError(f"{value!r} is not a list of numbers")
            return tuple(number(v) for v in value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    if kind == "int" and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # also NumPy's
    if kind == "str" and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind == "bool" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{name} must be of type {kind}, got {value!r}")
    return value


_FROM_ONE = ("epochs", "batch_size", "accumulate", "begin_epoch", "awp_begin_epoch", "image_size")
_FROM_ZERO = ("steps", "eps_warmup", "val", "tau", "workers")

# (settings, test of a value, rule in words)
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_FROM_ONE, lambda v: v >= 1, ">= 1"),
    (_FROM_ZERO, lambda v: v >= 0, ">= 0"),
    (_FROM_ONE + _FROM_ZERO, lambda v: v < 2**31, "below 2^31"),
    (
        ("eps", "alpha", "weight_decay", "emr", "norm_penalty", "awp", "beta", "clip"),
        lambda v: 0 <= v < math.inf,
        "finite and >= 0",
    ),
    (("lr",), lambda v: 0 < v < math.inf, "finite and > 0"),
    (("momentum", "ema"), lambda v: 0 <= v < 1, "in [0, 1)"),
    (("seed",), lambda v: 0 <= v < 2**31, "in [0, 2^31)"),
)


def _check_milestones(name: str, milestones: tuple[float, ...]) -> None:
    for m in milestones:
        if not 0 <= m < 1:
            raise ValueError(
                f"{name} must be shares of the run in [0, 1), got {m:g}: write 75/100 for the end "
                "of epoch 75 of 100"
            )
    if list(milestones) != sorted(milestones):
        raise ValueError(f"{name} must rise, got {', '.join(f'{m:g}' for m in milestones)}")
