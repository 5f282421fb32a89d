"""The fast gradient sign method and its iterated form with momentum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyadv.attacks.pgd import PGD
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.rules import MomentumRule
from pyadv.engine.settable import Setting
from pyadv.engine.starts import Start
from pyadv.engine.task import FloatOrTensor, radius
from pyadv.menus import Norm


class FGSM(PGD):
    """One step of size eps from x: in Linf x + eps sign(gradient), clipped to the box.

    Takes what `PGD` takes except `alpha` and `steps`, which are eps and 1.

    Source: Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR
    2015), section 4.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        start: Start = "none",
        **settings: Any,
    ):
        for name in ("alpha", "steps"):
            if name in settings:
                raise TypeError(f"FGSM has no argument {name}: it makes one step of size eps")
        eps = radius(eps, checks.canonical_norm(norm))
        settings["norm"] = norm
        super().__init__(model, eps=eps, alpha=eps, steps=1, start=start, **settings)


class MIFGSM(PGD):
    """Momentum iterative FGSM: the step follows g <- decay g + gradient / mean |gradient|. (The
    paper divides by the L1 norm, which differs by a constant that no step sees.)

    Takes what `PGD` takes, and

    Args:
        decay: of the sum of gradients, >= 0; 0 is PGD, 1 the paper's setting.
        alpha: step size; eps / steps by default, as in the paper.

    Source: Dong et al., "Boosting Adversarial Attacks with Momentum" (CVPR 2018), algorithm 1.
    """

    _rule = Setting("settings.rule")
    decay = Setting("settings.rule.decay")

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        decay: float = 1.0,
        norm: Norm | float = "Linf",
        eps: FloatOrTensor | None = None,
        alpha: FloatOrTensor | None = None,
        steps: int = 10,
        start: Start = "none",
        **settings: Any,
    ):
        checks.size("decay", decay, tensor=False)
        eps = radius(eps, checks.canonical_norm(norm))
        if alpha is None:
            checks.size("eps", eps)
            alpha = eps / max(checks.count("steps", steps, 0), 1)
        settings["norm"] = norm
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, start=start, **settings)
        self.settings = replace(self.settings, rule=MomentumRule(decay))


fgsm = functional("fgsm", FGSM)
mifgsm = functional("mifgsm", MIFGSM)
