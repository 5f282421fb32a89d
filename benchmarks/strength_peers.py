"""Attacks of other libraries whose strength is compared, each as a call on a model and a batch.

`fixed(...)` and `nearest(...)` map the name of a method to the libraries that have it. A maker
takes the model and images with their labels, and returns the adversarial examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[nn.Module, Tensor, Tensor], Tensor]
Makers = dict[str, dict[str, Maker]]  # method -> library -> maker
P = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
ART = "adversarial-robustness-toolbox"


def fixed(norm: str, eps: float, steps: int, queries: int, targets: int) -> Makers:
    """Return the attacks within a radius. PGD's step is a tenth of the radius."""
    alpha, p = eps / 10, P[norm]

    def torchattacks(name: str, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            import torchattacks

            return getattr(torchattacks, name)(model, eps=eps, **settings)(x, y)

        return call

    def torchattack(name: str) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            import torchattack

            kind = getattr(torchattack, name)
            return kind(model, device=x.device, eps=eps, alpha=alpha, steps=steps)(x, y).detach()

        return call

    def foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import foolbox

        kind = getattr(foolbox.attacks, f"{norm}ProjectedGradientDescentAttack")
        attack = kind(abs_stepsize=alpha, steps=steps)
        return attack(_foolbox_model(model, x), x, y, epsilons=eps)[1]

    def art(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch as Attack

        settings: dict[str, Any] = dict(norm=p, eps=eps, eps_step=alpha, max_iter=steps)
        settings |= dict(num_random_init=1, batch_size=len(x), verbose=False)
        return _from_art(Attack(_art_model(model, x), **settings), x, y)

    def art_apgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from art.attacks.evasion import AutoProjectedGradientDescent as Attack

        settings: dict[str, Any] = dict(norm=p, eps=eps, eps_step=2 * eps, max_iter=steps)
        settings |= dict(nb_random_init=1, batch_size=len(x), verbose=False)
        return _from_art(Attack(_art_model(model, x), **settings), x, y)

    def adv_lib_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from adv_lib.attacks import pgd_linf

        return pgd_linf(model, x, y, eps, steps=steps, absolute_step_size=alpha)

    def adv_lib_apgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from adv_lib.attacks import apgd

        settings: dict[str, Any] = dict(n_iter=steps, loss_function="ce", use_large_reps=p == 1)
        return apgd(model, x, y, eps, p, **settings)

    def adv_lib_apgd_t(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from adv_lib.attacks import apgd_targeted

        settings: dict[str, Any] = dict(n_iter=steps, use_large_reps=p == 1)
        return apgd_targeted(model, x, y, eps, p, num_targets=targets, **settings)

    def pyautoattack(kind: str, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            from pyautoattack import autopgd_base, square

            module = square if kind == "SquareAttack" else autopgd_base
            attack = getattr(module, kind)(model, norm=norm, eps=eps, device=x.device, **settings)
            return attack.perturb(x, y)

        return call

    large = {"use_largereps": norm == "L1"}
    found: Makers = {"PGD": {"foolbox": foolbox, ART: art}, "APGD": {}, "APGD-T": {}, "Square": {}}
    found["APGD"] = {
        "adv-lib": adv_lib_apgd,
        "pyautoattack": pyautoattack("APGDAttack", n_iter=steps, **large),
    }
    found["APGD-T"] = {
        "adv-lib": adv_lib_apgd_t,
        "pyautoattack": pyautoattack(
            "APGDAttack_targeted", n_iter=steps, n_target_classes=targets, **large
        ),
    }
    found["Square"] = {"pyautoattack": pyautoattack("SquareAttack", n_queries=queries)}
    if norm == "L1":
        return found
    found["APGD"] |= {"torchattacks": torchattacks("APGD", norm=norm, steps=steps), ART: art_apgd}
    found["Square"]["torchattacks"] = torchattacks("Square", norm=norm, n_queries=queries)
    own = {"Linf": "PGD", "L2": "PGDL2"}[norm]
    found["PGD"]["torchattacks"] = torchattacks(own, alpha=alpha, steps=steps)
    found["PGD"]["torchattack"] = torchattack(own)
    if norm == "Linf":
        found["PGD"]["adv-lib"] = adv_lib_pgd
        momentum = {
            "torchattacks": torchattacks("MIFGSM", alpha=alpha, steps=steps, decay=1.0),
            "torchattack": torchattack("MIFGSM"),
        }
        found["MI-FGSM"] = momentum
    return found


def nearest(norm: str, steps: int, fab: int, searches: int, search_steps: int) -> Makers:
    """Return the attacks that look for the nearest point."""
    p = P[norm]

    def adv_lib(name: str, *given: Any, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            from adv_lib import attacks

            return getattr(attacks, name)(model, x, y, *given, **settings)

        return call

    def foolbox(name: str, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            import foolbox

            attack = getattr(foolbox.attacks, name)(**settings)
            return attack(_foolbox_model(model, x), x, y, epsilons=None)[1]

        return call

    def pyautoattack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        from pyautoattack.fab_pt import FABAttack_PT

        attack = FABAttack_PT(model, norm=norm, n_iter=fab, eps=_FAR[norm], device=x.device)
        return attack.perturb(x, y)

    def torchattacks(name: str, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            import torchattacks

            return getattr(torchattacks, name)(model, **settings)(x, y)

        return call

    def torchattack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        import torchattack

        return torchattack.DeepFool(model, device=x.device, steps=50)(x, y).detach()

    def art(name: str, **settings: Any) -> Maker:
        def call(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            from art.attacks import evasion

            attack = getattr(evasion, name)(
                _art_model(model, x), batch_size=len(x), verbose=False, **settings
            )
            return _from_art(attack, x, y)

        return call

    ball = "LInf" if norm == "Linf" else norm
    found: Makers = {
        "FMN": {
            "adv-lib": adv_lib("fmn", p, steps=steps),
            "foolbox": foolbox(f"{ball}FMNAttack", steps=steps),
        }
    }
    if norm == "L0":
        found["sigma-zero"] = {"adv-lib": adv_lib("sigma_zero", num_steps=steps)}
        found["VFGA"] = {"adv-lib": adv_lib("vfga", False)}
        return found
    # torchattacks' FAB is a copy of the authors' code, which pyautoattack packages.
    found["FAB"] = {"adv-lib": adv_lib("fab", p, n_iter=fab), "pyautoattack": pyautoattack}
    found["PDPGD"] = {"adv-lib": adv_lib("pdpgd", p, num_steps=steps)}
    if norm != "L2":
        if norm == "Linf":
            found["DeepFool"] = {
                "adv-lib": adv_lib("df", norm=p, steps=50),
                "foolbox": foolbox("LinfDeepFoolAttack", steps=50),
            }
        else:
            found["EAD"] = {
                "foolbox": foolbox(
                    "EADAttack",
                    binary_search_steps=searches,
                    steps=search_steps,
                    initial_const=0.1,
                    decision_rule="L1",
                )
            }
        return found
    found["DDN"] = {
        "adv-lib": adv_lib("ddn", steps=steps, levels=None),
        "foolbox": foolbox("DDNAttack", steps=steps),
    }
    search = dict(binary_search_steps=searches, initial_const=0.1)
    found["CW"] = {
        "adv-lib": adv_lib("carlini_wagner_l2", max_iterations=search_steps, **search),
        "foolbox": foolbox("L2CarliniWagnerAttack", steps=search_steps, **search),
        "torchattacks": torchattacks("CW", steps=searches * search_steps),
        ART: art("CarliniL2Method", max_iter=search_steps, **search),
    }
    found["DeepFool"] = {
        "adv-lib": adv_lib("df", steps=50),
        "foolbox": foolbox("L2DeepFoolAttack", steps=50),
        "torchattacks": torchattacks("DeepFool", steps=50),
        "torchattack": torchattack,
        ART: art("DeepFool", max_iter=50, epsilon=0.02),
    }
    found["SuperDeepFool"] = {"adv-lib": adv_lib("sdf")}
    found["ALMA"] = {"adv-lib": adv_lib("alma", num_steps=steps, distance="l2")}
    found["PDGD"] = {"adv-lib": adv_lib("pdgd", num_steps=steps)}
    found["TR"] = {"adv-lib": adv_lib("tr", iter=steps)}
    return found


_FAR = {"Linf": 1.0, "L2": 28.0, "L1": 784.0}  # a radius that no nearest point exceeds


def _foolbox_model(model: nn.Module, x: Tensor) -> Any:
    import foolbox

    return foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)


def _art_model(model: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    shape, loss = tuple(x.shape[1:]), nn.CrossEntropyLoss()
    return PyTorchClassifier(model, loss, shape, classes, clip_values=(0, 1), device_type="cpu")


def _from_art(attack: Any, x: Tensor, y: Tensor) -> Tensor:
    """ART takes and returns NumPy arrays."""
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)
