"""Checkpoints of training: written whole or not at all, read without running code."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pyadv import _state, models
from pyadv.data import Images
from pyadv.training.config import Config

KIND, FORMAT = "checkpoint", 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of plain values and tensors; the old file stays if this fails."""
    _state.save(path, state, KIND, FORMAT)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises FileNotFoundError, or ValueError for a file that `save` did not write.
    """
    return _state.load(path, KIND, FORMAT)


@dataclass(frozen=True)
class Trained:
    """A trained network with the settings of its run.

    Attributes:
        model: in eval mode, on the CPU; the average of the weights if the run has one.
        config: settings of the run.
        architecture: arguments of `pyadv.models.create` that made the network.
    """

    model: nn.Module
    config: Config
    architecture: dict[str, Any]

    def check(self, data: Images) -> None:
        """Raise ValueError unless the network takes these images and knows their classes."""
        a = self.architecture
        takes = (a["in_channels"], *a["image_size"])
        if data.shape != takes or len(data.classes) > a["num_classes"]:
            raise ValueError(
                f"{data.name} has {data.shape} images of {len(data.classes)} classes, the network "
                f"takes {takes} and knows {a['num_classes']}"
            )


def load_model(path: str | Path, model: nn.Module | None = None) -> Trained:
    """Load the trained network of a run folder or a checkpoint file.

    Args:
        path: the folder or file.
        model: receives the weights: a network like the one that the run was given from Python. A
            run that built its network from a name needs none.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it cannot be read, if it needs a `model`, or must not call what it names.
    """
    path = Path(path)
    state = load(path / "checkpoint.pt" if path.is_dir() else path)
    config = Config.from_dict(state["config"])
    if model is None:
        model = network(state["architecture"])
    elif config.mean is not None and config.std is not None:
        model = models.Normalized(model, config.mean, config.std)
    if config.ema:
        average = AveragedModel(model)
        average.load_state_dict(state["average"])
        model = average.module
    else:
        model.load_state_dict(state["model"])
    return Trained(model.eval(), config, state["architecture"])


def network(architecture: dict[str, Any]) -> nn.Module:
    """Build the network that a file describes, without weights.

    Raises ValueError for a name that a file must not call, see `pyadv.models.check_restorable`.
    """
    if architecture["name"] is None:
        raise ValueError(
            f"the run trained a {architecture['class']} that it was given: "
            "load_model(path, model=...) takes one like it"
        )
    models.check_restorable(architecture["name"])
    return models.create(**architecture)


def newest_state(folder: Path) -> dict[str, Any]:
    """Read the state from which the run in `folder` continues.

    best.pt is written before checkpoint.pt. If the process died between the two, best.pt holds the
    later state of the same run, and only that state agrees with it.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it cannot be read.
    """
    state = load(folder / "checkpoint.pt")
    with contextlib.suppress(FileNotFoundError, ValueError):  # a best.pt is not needed to resume
        best = load(folder / "best.pt")
        ahead = (best["epoch"], best["step"]) > (state["epoch"], state["step"])
        past = best["records"][: len(state["records"])]
        if ahead and best["config"] == state["config"] and past == state["records"]:
            return best
    return state


def check_parts(state: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless the run that saved `state` had the parts `now`.

    `now` may hold some of the entries of `Trainer.parts`. Old checkpoints have no "parts" and pass.
    """
    kept = state.get("parts", {})
    for name, value in now.items():
        if (had := kept.get(name, value)) != value:
            raise ValueError(
                f"the run had another {name} (then: {had}, now: {value}): "
                "give resume what train was given"
            )


def check_readable(name: str, state: Any) -> None:
    """Raise ValueError, with the `name` of the part, if a checkpoint with its `state` could not be
    read back.
    """
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"state_dict of {name} must hold plain values and tensors alone, or no checkpoint with "
            f"it could be read: {why}"
        ) from error


def rng_state() -> dict[str, Any]:
    """Return the states of torch's generators, the only ones that training draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; other CUDA devices than then keep their states."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
