"""Load weights from files of PyTorch and safetensors, without running code."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Keys under which checkpoints of PyTorch codes keep the state dict.
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # wrappers: DDP, torch.compile, Normalized


def load_weights(
    model: nn.Module,
    path: str | Path,
    num_classes: int | None = None,
    *,
    normalized: bool = False,
) -> None:
    """Load the weights in the file `path` into `model`.

    The file is a state dict, or a checkpoint that holds one, written by `torch.save`, or a
    `.safetensors` file. The prefixes of wrappers (`module.`, `_orig_mod.`, `model.`) are removed. A
    classifier for another number of classes is left as it is, with a warning: the network is then
    fine-tuned.

    Args:
        model: receives the weights.
        path: the file.
        num_classes: the number of logits, by which a classifier is recognised; None: every tensor
            must fit.
        normalized: whether the images that `model` receives are normalised already. If they are
            not, a file with the weights of a `Normalized` network gives a warning: its mean and std
            are not loaded.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it cannot be read, or if its weights do not fit the network.
        ImportError: if safetensors is needed and is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file at {path}")
    own = model.state_dict()
    state = _without_prefixes(_read(path), own)
    if left_out := [key for key in ("mean", "std") if key in state and key not in own]:
        state = {key: value for key, value in state.items() if key not in left_out}
        if not normalized:
            warnings.warn(
                f"weights: {path} is for a network that normalises its images, and "
                f"{' and '.join(left_out)} in it are left out: give mean and std",
                stacklevel=2,
            )
    fresh = [
        key
        for key, value in state.items()
        if key in own and value.shape != own[key].shape and _is_head(value, own[key], num_classes)
    ]
    problems = []
    if absent := [key for key in own if key not in state]:
        problems.append(f"it lacks {_some(absent)}")
    if unknown := [key for key in state if key not in own]:
        problems.append(f"the network has no {_some(unknown)}")
    for key, value in state.items():
        if key in own and key not in fresh and value.shape != own[key].shape:
            seen = f"{tuple(value.shape)}, not {tuple(own[key].shape)}"
            problems.append(f"{key} has shape {seen}")
    if problems:
        raise ValueError(f"weights: {path} does not fit the network: {'; '.join(problems[:3])}")
    if fresh:
        warnings.warn(
            f"weights: {path} is for another number of classes; {', '.join(fresh)} "
            "keep their fresh values",
            stacklevel=2,
        )
    model.load_state_dict({key: own[key] if key in fresh else state[key] for key in own})


def _read(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"weights: {path} needs safetensors: pip install safetensors") from (
                error
            )
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"weights: {path} cannot be read: {error}") from error
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"weights: {path} cannot be read as tensors alone ({why}); save model.state_dict()"
        ) from error
    for key in _INSIDE:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(_is_entry(*i) for i in state.items()):
        raise ValueError(
            f"weights: {path} holds no state dict; it must hold one, or a dict with one under "
            f"{', '.join(_INSIDE)}"
        )
    return state


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _without_prefixes(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers while that lets more keys fit the network."""
    best = state
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            cut = {key.removeprefix(prefix): value for key, value in state.items()}
            if len(cut) == len(state) and cut.keys() != state.keys():
                state = cut
                break
        else:
            break
        if len(state.keys() & own.keys()) > len(best.keys() & own.keys()):
            best = state
    return best


def _is_head(value: Tensor, own: Tensor, num_classes: int | None) -> bool:
    """Return whether both are the weight or the bias of a classifier, for other classes."""
    same = value.dim() == own.dim() > 0 and value.shape[1:] == own.shape[1:]
    return same and own.shape[0] == num_classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
