"""AutoAttack with the interface of the authors' package: arguments, attributes and methods.

adversary = AutoAttack(model, norm="Linf", eps=8/255, version="standard")
x_adv = adversary.run_standard_evaluation(x, y, bs=250)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyadv import attacks
from pyadv.attacks import Parity
from pyadv.attacks.autoattack import VERSIONS, Member, Version, plan
from pyadv.attacks.progress import Lines
from pyadv.engine import checks
from pyadv.engine.loop import predict
from pyadv.menus import Norm

_OURS = {
    "n_iter": "steps",
    "n_queries": "steps",
    "n_restarts": "restarts",
    "n_target_classes": "targets",
    "eot_iter": "eot",
    "rho": "rho",
    "use_largereps": "multi_eps",
    "p_init": "p",
}


class _Part:
    """The settings of one part of AutoAttack, under the names of the authors' package."""

    def __init__(self, **settings: Any):
        self.__dict__.update(settings)

    def take(self, member: Member) -> None:
        """Copy the settings of `member`."""
        for name in vars(self):
            setattr(self, name, getattr(member, _OURS[name]))

    def member(self) -> Member:
        """Return the settings as ours."""
        return Member(**{_OURS[name]: value for name, value in vars(self).items()})


class AutoAttack:
    """AutoAttack for scripts written for the authors' package.

    Args:
        model: maps x in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: the radius.
        seed: seed of the noise; None takes the time, as in the authors' package.
        verbose: print one line per attack to stderr, and to the file `log_path`.
        attacks_to_run: names, with version="custom"; may be set later.
        version: "standard", "plus", "rand" or "custom".
        is_tf_model: must be False.
        device: where batches are sent; the device of the data by default (the authors' default is
            "cuda").
        parity: faults to repeat, see `pyadv.attacks.Parity`. With None, the default, random numbers
            are keyed and torch's generator stays as it is.

    `apgd`, `apgd_targeted`, `fab` and `square` have the attributes that scripts set: n_restarts,
    n_iter, n_target_classes, eot_iter, rho, use_largereps; n_queries and p_init.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        norm: Norm = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: Version = "standard",
        is_tf_model: bool = False,
        device: str | torch.device | None = None,
        log_path: str | Path | None = None,
        parity: Parity | None = None,
    ):
        if is_tf_model:
            raise ValueError("is_tf_model=True is not supported: models are PyTorch callables")
        if version != "custom" and attacks_to_run:
            raise ValueError('attacks_to_run needs version="custom"')
        self.model, self.norm, self.epsilon, self.seed = model, norm, eps, seed
        self.verbose, self.device, self.log_path = verbose, device, log_path
        self.attacks_to_run, self.version, self.parity = list(attacks_to_run), version, parity
        shared = {"n_iter": 100, "eot_iter": 1, "rho": 0.75, "use_largereps": False}
        self.apgd = _Part(n_restarts=5, **shared)
        self.apgd_targeted = _Part(n_restarts=1, n_target_classes=9, **shared)
        self.fab = _Part(n_restarts=5, n_iter=100, n_target_classes=9)
        self.square = _Part(n_restarts=1, n_queries=5000, p_init=0.8)
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: Version = "standard") -> None:
        """Choose the members of a version, with its settings."""
        checks.choice("version", version, tuple(VERSIONS))
        self.version, self.attacks_to_run = version, list(VERSIONS[version])
        for name, member in plan(version, checks.canonical_norm(self.norm)).items():
            if name in self.attacks_to_run:
                self._part(name).take(member)

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

        A call with the same `state_path` continues from there, with the examples found before; give
        a `seed` for that, since the time is another seed at every call. `state_name` names a model
        that is a lambda or a local function.
        """
        checks.batch(x_orig, y_orig, None)
        native = self._native(len(x_orig))
        x, y = (t.to(self.device or t.device) for t in (x_orig, y_orig))
        found = native.run_standard_evaluation(
            x, y, bs, return_labels, state_path, state_name=state_name
        )
        if isinstance(found, Tensor):
            return found.to(x_orig.device)
        return found[0].to(x_orig.device), found[1].to(x_orig.device)

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Run each attack by itself; return what `run_standard_evaluation` returns, by name."""
        chosen, found = self.attacks_to_run, {}
        try:
            for name in chosen:
                self.attacks_to_run = [name]
                found[name] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        finally:
            self.attacks_to_run = chosen
        return found

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Return the share of samples that the model classifies as y."""
        checks.batch(x_orig, y_orig, None)
        settings, correct = attacks.PGD().settings, 0
        for x, y in zip(x_orig.split(bs), y_orig.split(bs), strict=True):
            predicted = predict(self.model, x.to(self.device or x.device), settings).argmax(1)
            correct += int((predicted == y.to(predicted.device)).sum())
        return correct / len(y_orig)

    def _part(self, name: str) -> _Part:
        parts = {"fab": self.fab, "fab-t": self.fab, "square": self.square}
        return parts.get(name, self.apgd_targeted if name == "apgd-t" else self.apgd)

    def _native(self, samples: int | None = None) -> attacks.AutoAttack:
        native = attacks.AutoAttack(
            self.model,
            norm=self.norm,
            eps=self.epsilon,
            version="custom",
            attacks=self.attacks_to_run,
            seed=int(time.time()) if self.seed is None else self.seed,
            progress=Lines(self.log_path, samples) if self.verbose else None,
            parity=self.parity,
        )
        for name in self.attacks_to_run:
            native.plan[name] = self._part(name).member()
        if "fab-t" in self.attacks_to_run:
            native.plan["fab-t"].restarts = 1  # the authors' FAB-T ignores its n_restarts
        return native
