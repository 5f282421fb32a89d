"""Trained runs on the Hugging Face Hub.

run = PretrainedRun.from_run("runs/trades")
run.push_to_hub("me/trades-fashion")                 # or run.save_pretrained("folder")
model = PretrainedRun.from_pretrained("me/trades-fashion")
logits = model(x)

The weights are stored as safetensors, the settings of the run as JSON, so that loading runs no
code. It needs `huggingface_hub` and `safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pyadv.training import Config
from pyadv.training import load_model as load_run
from pyadv.training.checkpoint import Trained, network

WEIGHTS, SETTINGS = "model.safetensors", "config.json"


class PretrainedRun(  # type: ignore[call-arg]  # ModelHubMixin takes the keywords
    nn.Module,
    ModelHubMixin,
    library_name="pyadv",
    tags=["pyadv", "adversarial-training", "robustness"],
):
    """The network of a trained run, in eval mode, with `save_pretrained`, `from_pretrained` and
    `push_to_hub`.

    Args:
        run: what `pyadv.training.load_model` returns.

    Attributes:
        model: the network; calls are passed to it.
        config: the settings of the run.
        architecture: the arguments of `pyadv.models.create` that make the network.
    """

    def __new__(cls, *arguments: Any, **settings: Any) -> PretrainedRun:
        # ModelHubMixin would turn the arguments into JSON, which a network is not
        return object.__new__(cls)

    def __init__(self, run: Trained):
        super().__init__()
        self.model, self.config, self.architecture = run.model, run.config, run.architecture
        self.eval()

    @classmethod
    def from_run(cls, path: str | Path) -> PretrainedRun:
        """Return the network of a run folder or a checkpoint file."""
        return cls(load_run(path))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.model, str(save_directory / WEIGHTS))
        settings = {"architecture": self.architecture, "config": self.config.to_dict()}
        (save_directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **others: Any,
    ) -> PretrainedRun:
        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id) / name
            return Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )

        paths = {name: find(name) for name in (SETTINGS, WEIGHTS)}
        for name, path in paths.items():
            if not path.exists():
                raise FileNotFoundError(f"{model_id} is no saved run of pyadv: it has no {name}")
        settings = json.loads(paths[SETTINGS].read_text())
        architecture = settings["architecture"]
        architecture["image_size"] = tuple(architecture["image_size"])
        model = network(architecture)
        load_model(model, str(paths[WEIGHTS]))
        run = Trained(model.eval(), Config.from_dict(settings["config"]), architecture)
        return cls(run)
