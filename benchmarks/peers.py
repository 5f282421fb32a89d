"""The libraries that pyadv is compared with, and calls that ask each for the same attack.

`pip install --no-deps -r benchmarks/peers.txt` installs them beside an existing torch. Libraries
that cannot be imported are listed as absent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from problems import Maker
from torch import Tensor, nn

# distribution -> the module that must be importable
MODULES = {
    "torchattacks": "torchattacks",
    "foolbox": "foolbox",
    "adv-lib": "adv_lib.attacks",
    "adversarial-robustness-toolbox": "art.attacks.evasion",
    "torchattack": "torchattack",
    "pyautoattack": "pyautoattack",
}


def installed() -> dict[str, str | None]:
    """Return the version of each peer, or None if it cannot be imported."""
    found: dict[str, str | None] = {}
    for name, module in MODULES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
            found[name] = importlib.metadata.version(name)
        except Exception:  # an import may fail in any way
            found[name] = None
    return found


def pgd(x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> dict[str, Maker]:
    """Return Linf PGD on the cross-entropy, started at x, so that all follow the same iterates."""

    def torchattacks(model: nn.Module) -> Callable[[], Tensor]:
        import torchattacks

        attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=False)
        return lambda: attack(x, y)

    def foolbox(model: nn.Module) -> Callable[[], Tensor]:
        import foolbox

        inside = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
        return lambda: attack(inside, x, y, epsilons=eps)[1]

    def adv_lib(model: nn.Module) -> Callable[[], Tensor]:
        from adv_lib.attacks import pgd_linf

        settings: dict[str, Any] = dict(steps=steps, random_init=False, absolute_step_size=alpha)
        return lambda: pgd_linf(model, x, y, eps, **settings)

    def art(model: nn.Module) -> Callable[[], Tensor]:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        kind = "gpu" if x.is_cuda else "cpu"
        shape = tuple(x.shape[1:])
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        inside = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), shape, classes, clip_values=(0, 1), device_type=kind
        )
        attack = ProjectedGradientDescentPyTorch(
            inside, eps=eps, eps_step=alpha, max_iter=steps, batch_size=len(x), verbose=False
        )
        # It takes and returns NumPy arrays, so the conversion is part of its cost.
        return lambda: torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)

    def torchattack(model: nn.Module) -> Callable[[], Tensor]:
        import torchattack

        attack = torchattack.PGD(
            model, device=x.device, eps=eps, alpha=alpha, steps=steps, random_start=False
        )
        return lambda: attack(x, y).detach()

    return {
        "torchattacks": torchattacks,
        "foolbox": foolbox,
        "adv-lib": adv_lib,
        "adversarial-robustness-toolbox": art,
        "torchattack": torchattack,
    }


def apgd(x: Tensor, y: Tensor, eps: float, steps: int) -> dict[str, Maker]:
    """Return Linf APGD on the cross-entropy; each library draws its own start."""

    def torchattacks(model: nn.Module) -> Callable[[], Tensor]:
        import torchattacks

        attack = torchattacks.APGD(model, eps=eps, steps=steps)
        return lambda: attack(x, y)

    def adv_lib(model: nn.Module) -> Callable[[], Tensor]:
        from adv_lib.attacks import apgd

        return lambda: apgd(
            model, x, y, eps, float("inf"), n_iter=steps, n_restarts=1, loss_function="ce"
        )

    def pyautoattack(model: nn.Module) -> Callable[[], Tensor]:
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(model, n_iter=steps, eps=eps, norm="Linf", device=x.device)
        return lambda: attack.perturb(x, y)

    return {"torchattacks": torchattacks, "adv-lib": adv_lib, "pyautoattack": pyautoattack}


def autoattack(x: Tensor, y: Tensor, eps: float, batch_size: int, seed: int) -> dict[str, Maker]:
    """Return AutoAttack's standard ensemble. torchattacks' class of that name runs 10 iterations of
    each attack instead of the authors' 100, so it is weaker; the other peers have none."""

    def pyautoattack(model: nn.Module) -> Callable[[], Tensor]:
        from pyautoattack import AutoAttack

        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        attack = AutoAttack(model, norm="Linf", eps=eps, device=x.device, seed=seed)
        return lambda: attack.run_standard_evaluation(x, y, batch_size=batch_size)[0]

    def torchattacks(model: nn.Module) -> Callable[[], Tensor]:
        import torchattacks

        attack = torchattacks.AutoAttack(model, eps=eps, seed=seed)
        return lambda: torch.cat(
            [attack(a, b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
        )

    return {"pyautoattack": pyautoattack, "torchattacks": torchattacks}


@contextlib.contextmanager
def quiet():
    """Silence the logs and warnings of the peers."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
