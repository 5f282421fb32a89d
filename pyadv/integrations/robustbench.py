"""RobustBench on pyadv: its benchmark with our AutoAttack, and the models of its zoo.

    from pyadv.integrations import robustbench; robustbench.install()
    from robustbench import benchmark
    clean, robust = benchmark(model, dataset="cifar10", threat_model="Linf", eps=8/255)

`install` makes `import autoattack`, which RobustBench does, find pyadv.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyadv.compat import autoattack
from pyadv.engine import checks
from pyadv.menus import Norm

DATASETS = ("cifar10", "cifar100", "imagenet")
THREATS = ("Linf", "L2", "corruptions", "corruptions_3d")


@dataclass
class EvaluationState:
    """What a state file says of an evaluation, in the form of `autoattack.state`.

    Attributes:
        path: the file.
        attacks_to_run, run_attacks: names of the attacks, and of those that have run.
        robust_flags: (N,) float32, 1 for samples that nothing has broken. The authors' class has
            bools here, of which RobustBench cannot take the mean.
        clean_accuracy: share of samples classified correctly without an attack.
    """

    path: Path
    attacks_to_run: set[str]
    run_attacks: set[str]
    robust_flags: Tensor
    clean_accuracy: float

    @property
    def robust_accuracy(self) -> float:
        """The share of samples that nothing has broken."""
        return self.robust_flags.mean().item()

    def to_disk(self) -> None:
        """Write the file."""
        content = {
            "_attacks_to_run": str(self.attacks_to_run),
            "path": str(self.path),
            "_run_attacks": sorted(self.run_attacks),
            "_robust_flags": self.robust_flags.bool().tolist(),
            "_last_saved": str(datetime.now()),
            "_SAVE_TIMEOUT": 60,
            "_clean_accuracy": self.clean_accuracy,
        }
        self.path.write_text(json.dumps(content))

    @classmethod
    def from_disk(cls, path: str | Path) -> EvaluationState:
        """Read a file that `to_disk` or the authors' package wrote."""
        path = Path(path)
        content = json.loads(path.read_text())
        named = content["_attacks_to_run"]
        if isinstance(named, str):  # a set, printed
            named = [name for name in named.strip("{}").replace("'", "").split(", ") if name]
        flags = torch.tensor(content["_robust_flags"], dtype=torch.float32)
        done = set(content["_run_attacks"])
        return cls(path, set(named), done, flags, float(content["_clean_accuracy"]))


class AutoAttack(autoattack.AutoAttack):
    """`pyadv.compat.autoattack.AutoAttack` with the state files of the authors' package.

    What was found is kept in a file of pyadv beside `state_path`, whose name ends in ".pyadv", also
    at an interruption; a call with the same `state_path` continues from it, and returns the
    examples found before too. `state_path` itself is written at the end, for `EvaluationState`.

    Args:
        seed: None means 0, because a continued evaluation needs the seed that it began with.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        norm: Norm = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        **settings: Any,
    ):
        super().__init__(model, norm, eps, 0 if seed is None else seed, **settings)

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
        state_name: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return x_adv, and with `return_labels` the predicted classes.

        Raises:
            ValueError: if `state_path` was written by the authors' package; pyadv cannot continue
                it.
        """
        if state_path is None:
            return super().run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        path = Path(state_path)
        own = path.with_name(path.name + ".pyadv")
        if path.exists() and not own.exists():
            raise ValueError(
                f"{path} was written by the authors' AutoAttack, which pyadv cannot continue: "
                f"there is no {own.name} beside it; choose another file"
            )
        x_adv, predicted = super().run_standard_evaluation(
            x_orig, y_orig, bs, True, own, state_name=state_name
        )
        robust = predicted == y_orig.to(predicted.device)
        names, clean = set(self.attacks_to_run), self.clean_accuracy(x_orig, y_orig, bs)
        EvaluationState(path, names, names, robust.float().cpu(), clean).to_disk()
        return (x_adv, predicted) if return_labels else x_adv


def install() -> None:
    """Make `import autoattack` find pyadv, in this process.

    A RobustBench that is imported already is switched over too.
    """
    package = types.ModuleType("autoattack", "AutoAttack, run by pyadv.")
    state = types.ModuleType("autoattack.state", "State files of AutoAttack, run by pyadv.")
    package.__path__ = []  # a package, which has submodules
    vars(package).update(AutoAttack=AutoAttack, state=state)
    vars(state).update(EvaluationState=EvaluationState)
    for name in [m for m in sys.modules if m.split(".")[0] == "autoattack"]:
        del sys.modules[name]
    sys.modules.update({"autoattack": package, "autoattack.state": state})
    evaluation = sys.modules.get("robustbench.eval")
    if evaluation is not None:
        vars(evaluation).update(AutoAttack=AutoAttack, EvaluationState=EvaluationState)


def load_model(name: str, model_dir: str | Path = "./models") -> nn.Module:
    """Return a model of RobustBench's zoo, in eval mode; its weights are downloaded into
    `model_dir` unless they are there.

    Args:
        name: "Rice2020Overfitting" for CIFAR-10 and Linf, else with the data set and the threat
            before it: "cifar100/Linf/Rice2020Overfitting".

    Raises:
        ImportError: if RobustBench is not installed.
        ValueError: if the zoo has no such model.
    """
    *place, name = name.split("/")
    if len(place) > 2:
        raise ValueError(f"name must be [DATASET/[THREAT/]]MODEL, got {'/'.join([*place, name])}")
    dataset, threat = [*place, *("cifar10", "Linf")[len(place) :]]
    checks.choice("dataset", dataset, DATASETS)
    checks.choice("threat", threat, THREATS)
    if importlib.util.find_spec("robustbench") is None:
        raise ImportError(
            "robustbench is not installed; "
            "pip install git+https://github.com/RobustBench/robustbench.git"
        )
    if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
        install()  # its __init__ imports autoattack
    utils = importlib.import_module("robustbench.utils")
    try:
        model = utils.load_model(
            name, model_dir=str(model_dir), dataset=dataset, threat_model=threat
        )
    except KeyError:
        raise ValueError(f"RobustBench has no model {name} for {dataset} and {threat}") from None
    return model.eval()
