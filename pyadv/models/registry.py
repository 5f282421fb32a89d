"""Build a network from its name: one of ours, one of timm, or a callable of the user's."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyadv import _imports
from pyadv._names import did_you_mean
from pyadv.models.normalized import Normalized
from pyadv.models.resnet import PreActResNet18, ResNet18
from pyadv.models.small_cnn import SmallCNN
from pyadv.models.weights import load_weights
from pyadv.models.wide_resnet import WideResNet
from pyadv.passes.borrow import pick_logits


def _wrn(depth: int, **variant: Any) -> Callable[..., nn.Module]:
    return lambda channels, classes, size: WideResNet(depth, 10, channels, classes, **variant)


# name -> function of (in_channels, num_classes, image_size)
MODELS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet-18": lambda channels, classes, size: ResNet18(channels, classes),
    "preact-resnet-18": lambda channels, classes, size: PreActResNet18(channels, classes),
    "wrn-28-10": _wrn(28),
    "wrn-32-10": _wrn(34),  # its name in FAT and GAIRAT, which do not count the shortcuts
    "wrn-34-10": _wrn(34),
    "wrn-34-10-madry": _wrn(34, slope=0.1, shortcut="pad"),
}


def create(
    name: str,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
    args: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    new_head: bool = True,
) -> nn.Module:
    """Build the network called `name` for images in [0, 1].

    Args:
        name: one of

            - a key of `MODELS`;
            - `timm:NAME`, a network of timm, which must be installed;
            - `package.module:name`, a class or function that is called and returns a network. It
              receives those of `num_classes`, `in_channels`, `image_size` (H, W) and `image_shape`
              (C, H, W) that its signature names. A network itself is copied.
        in_channels: channels of an image.
        num_classes: number of classes, the least number of logits.
        image_size: (H, W) of an image.
        args: further keyword arguments of the network; they come before those above.
        weights: a file of weights, see `load_weights`; by default they are fresh.
        mean: of the pixels, one number or one per channel. With `std` it makes the network compute
            on (x - mean) / std, so that eps stays in units of the pixels.
        std: their standard deviation.
        new_head: whether a classifier for another number of classes in `weights` is left out, with
            a warning, as fine-tuning needs it; otherwise it is an error.

    Returns:
        A network that maps (B, C, H, W) to logits (B, at least num_classes). One that returns a
        tuple, a dict or an output of Hugging Face is wrapped in `Logits`.

    Raises:
        ValueError: if there is no such network, if it refuses its arguments, if it does not map
            such images to at least `num_classes` logits, if the weights do not fit.
        ImportError: if timm is needed and is missing.
    """
    sizes = {"in_channels": (in_channels,), "num_classes": (num_classes,), "image_size": image_size}
    for argument, values in sizes.items():
        if any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in values):
            seen = values if argument == "image_size" else values[0]
            raise ValueError(f"{argument} must be positive and integer, got {seen}")
    _check_statistics(mean, std, in_channels)
    args = dict(args or {})
    if not all(isinstance(key, str) for key in args):
        raise ValueError(f"model_args must have names as keys, got {list(args)}")
    shape = (in_channels, *image_size)
    if name in MODELS:
        model = _call(name, MODELS[name], (in_channels, num_classes, tuple(image_size)), args)
    elif name.startswith("timm:"):
        model = _timm(name, num_classes, shape, args)
    elif ":" in name:
        model = _own(name, num_classes, shape, args)
    else:
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, timm:NAME or package.module:name, got "
            f"{name!r}{did_you_mean(name, MODELS)}"
        )
    if name not in MODELS:
        model = returning_logits(name, model, num_classes, shape)
    if weights is not None:
        inner = model.model if isinstance(model, Logits) else model
        load_weights(inner, weights, num_classes if new_head else None, normalized=mean is not None)
    return model if mean is None or std is None else Normalized(model, mean, std)


class Logits(nn.Module):
    """A module that returns the logits alone of a `model` that returns them in a tuple, in a dict
    or as an attribute.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return pick_logits(self.model(x), None)


def check_restorable(name: str) -> None:
    """Raise ValueError unless the network called `name` may be built because a file says so.

    A checkpoint names its network. Calling whatever it names would let a file from elsewhere run
    any function that is installed. A class derived from `nn.Module`, a function whose annotation
    says that it returns one and a network itself are called; others are refused, by training, too,
    before it begins.
    """
    if ":" not in name or name.startswith("timm:"):
        return
    found = _imports.find(name, "model")
    returned = found
    if callable(found) and not isinstance(found, (type, nn.Module)):
        try:
            returned = typing.get_type_hints(found).get("return")
        except (NameError, TypeError, AttributeError):  # an annotation that cannot be evaluated
            returned = None
    if not isinstance(returned, nn.Module) and not (
        isinstance(returned, type) and issubclass(returned, nn.Module)
    ):
        raise ValueError(
            f"model {name!r} must be a class derived from torch.nn.Module, or a function annotated "
            "to return one (def make(...) -> nn.Module): a checkpoint names it, and loading a "
            "checkpoint must not call anything else"
        )


def _check_statistics(mean: Any, std: Any, channels: int) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together, got mean={mean} and std={std}")
    for name, value in (("mean", mean), ("std", std)):
        count = len(value) if isinstance(value, Sequence) else 1
        if value is not None and count not in (1, channels):
            raise ValueError(
                f"{name} must be one number or one per channel ({channels}), got {count} numbers"
            )


def _call(
    name: str, make: Callable[..., Any], positional: tuple[Any, ...], args: dict[str, Any]
) -> Any:
    """Call `make`, and report arguments that it does not have."""
    try:
        inspect.signature(make).bind(*positional, **args)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise ValueError(f"model {name!r} does not take ({given}): {error}") from None
    except ValueError:  # it has no signature
        pass
    return make(*positional, **args)


def _own(name: str, num_classes: int, shape: tuple[int, int, int], args: dict[str, Any]) -> Any:
    make = _imports.find(name, "model")
    if isinstance(make, nn.Module):
        if args:
            raise ValueError(f"model {name!r} is a network already and takes no model_args")
        return copy.deepcopy(make)
    if not callable(make):
        raise ValueError(f"model {name!r} must be callable, got a {type(make).__name__}")
    known = {
        "num_classes": num_classes,
        "in_channels": shape[0],
        "image_size": shape[1:],
        "image_shape": shape,
    }
    parameters: Mapping[str, inspect.Parameter]
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        parameters = {}
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {n: known[n] for n, p in parameters.items() if n in known and p.kind in keyword}
    return _call(name, make, (), {**taken, **args})


def _timm(name: str, num_classes: int, shape: tuple[int, int, int], args: dict[str, Any]) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model {name!r} needs timm: pip install timm ({error})") from error
    kind = name.partition(":")[2]
    if not timm.is_model(kind.partition(".")[0]):
        hint = did_you_mean(kind, timm.list_models())
        raise ValueError(f"model {name!r}: timm has no {kind!r}{hint}")
    known: dict[str, Any] = {"num_classes": num_classes, "in_chans": shape[0]}
    # Networks of one image size, such as vision transformers, can be built for another.
    if getattr(timm.get_pretrained_cfg(kind), "fixed_input_size", False):
        known["img_size"] = shape[1:]
    try:
        return timm.create_model(kind, **{**known, **args})
    except TypeError as error:
        raise ValueError(f"model {name!r} refuses its arguments: {error}") from error


def returning_logits(
    name: str, model: Any, num_classes: int, shape: tuple[int, int, int]
) -> nn.Module:
    """Return `model` such that it returns logits, wrapped in `Logits` where it returns more.

    One image of zeros goes through it.

    Args:
        name: of the network, for error messages.
        model: the network.
        num_classes: the least number of logits.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: if it is no network or does not map such images to so many logits.
    """
    result, logits = _try(name, model, shape)
    if logits.shape[0] != 1 or logits.shape[1] < num_classes:
        raise ValueError(
            f"model {name!r} returns logits of shape {tuple(logits.shape)} for one image; the data "
            f"has {num_classes} classes"
        )
    return model if isinstance(result, Tensor) else Logits(model)


def count_logits(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Return how many logits a network returns for an image of the shape (C, H, W)."""
    return _try("model", model, shape)[1].shape[1]


def _try(name: str, model: Any, shape: tuple[int, int, int]) -> tuple[Any, Tensor]:
    """Return what a network makes of one image, and its logits."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r} must return a torch.nn.Module, got a {type(model).__name__}"
        )
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            x = torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
            result = model.eval()(x)
            logits = pick_logits(result, None)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"model {name!r} does not take images {shape}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    return result, logits
