"""The fast gradient sign method and its iterated form with momentum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyadv.attacks.pgd import PGD
from pyadv.engine import checks
from pyadv.engine.attack import functional
from pyadv.engine.rules import MomentumRule
from pyadv.engine.starts import Start
from pyadv.engine.task import FloatOrTensor


class FGSM(PGD):
    """One step of size eps from x: in Linf x + eps sign(gradient), clipped to the box.

    Takes what `PGD` takes except `alpha` and `steps`.

    Source: Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (ICLR
    2015), section 4.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        eps: FloatOrTensor = 8 / 255,
        start: Start = "none",
        **settings: Any,
    ):
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

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        decay: float = 1.0,
        eps: FloatOrTensor = 8 / 255,
        alpha: FloatOrTensor | None = None,
        steps: int = 10,
        start: Start = "none",
        **settings: Any,
    ):
        checks.size("decay", decay)
        if alpha is None:
            checks.size("eps", eps)
            alpha = eps / max(checks.count("steps", steps, 0), 1)
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, start=start, **settings)
        self.settings = replace(self.settings, rule=MomentumRule(decay))


fgsm = functional("fgsm", FGSM)
mifgsm = functional("mifgsm", MIFGSM)
