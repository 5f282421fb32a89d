"""What one training step minimises, put together from parts:

    objective = Objective(attack, base, weighting) + regulariser + ...
    loss = objective(model, x, y, epoch=e)

`base(step)` gives one loss per sample (B,), `weighting(step)` one weight per sample with mean 1, a
regulariser one number that is added. AT, FAT and GAIRAT below are such combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyadv import ops
from pyadv.attacks import PGD, FriendlyPGD
from pyadv.objectives._step import Schedule, Step, at_epoch

Rows = Callable[[Step], Tensor]


def cross_entropy(step: Step) -> Tensor:
    """Cross-entropy (B,) on what the step trains on."""
    return ops.weighted_cross_entropy(step.logits_adv, step.y)


class Objective:
    """mean_b(weight_b * base_b) + the regularisers.

    `objective(model, x, y, epoch=e, ids=None)` returns the scalar to call `.backward()` on. The
    model is in train mode, as for any training step; the attack sets and restores the modes it
    needs. `ids` (B,) int64 are the samples' indices in the training set: with them, keyed noise
    follows the sample. `objective + regulariser` is a new objective.

    Attributes:
        last: detached parts of the last step: x_adv, kappa (B,), logits, logits_adv, weights (B,),
            rows (B,), loss; None for what the objective did not need.
    """

    def __init__(
        self, attack: PGD | None, base: Rows = cross_entropy, weighting: Rows | None = None
    ):
        if attack is not None and not isinstance(attack, PGD):
            raise TypeError(f"attack must be a pyadv attack, got {type(attack).__name__}")
        self.attack = attack
        self.base = base
        self.weighting = weighting
        self.regularisers: tuple[Rows, ...] = ()
        self.last: dict[str, Any] = {}

    def __add__(self, regulariser: Rows) -> Objective:
        if not callable(regulariser) or isinstance(regulariser, (Objective, nn.Module)):
            raise TypeError(
                "an objective adds regularisers such as EMR(lam=...), "
                f"got {type(regulariser).__name__}"
            )
        total = copy.copy(self)
        total.regularisers = (*self.regularisers, regulariser)
        return total

    def __call__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        y: Tensor,
        epoch: int = 1,
        ids: Tensor | None = None,
    ) -> Tensor:
        self.prepare(epoch)
        output = None if self.attack is None else self.attack.settings.output
        step = Step(model, x, y, epoch, ids, self.attack, output)
        rows = self.base(step)
        weights = None if self.weighting is None else self.weighting(step)
        loss = rows.mean() if weights is None else (weights * rows).mean()
        for regulariser in self.regularisers:
            loss = loss + regulariser(step)
        self.last = {
            "x_adv": None if step.attack is None else step.x_train,
            "kappa": step.kappa,
            "logits": _detached(step.made("logits")),
            "logits_adv": _detached(step.made("logits_adv")),
            "weights": weights,
            "rows": rows.detach(),
            "loss": loss.detach(),
        }
        return loss

    def prepare(self, epoch: int) -> None:
        """What changes with the epoch, before its step."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1:
            raise ValueError(f"epoch counts from 1, got {epoch!r}")

    def state_dict(self) -> dict[str, Any]:
        return {} if self.attack is None else {"attack": self.attack.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.attack is not None:
            self.attack.load_state_dict(state["attack"])


class Standard(Objective):
    """Cross-entropy on the clean batch."""

    def __init__(self) -> None:
        super().__init__(None)


class AT(Objective):
    """Adversarial training: mean cross-entropy on the attack's examples.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018.
    """

    def __init__(self, attack: PGD):
        super().__init__(_needed(attack))


def fat_tau(epoch: int) -> int:
    """The tau of FAT's official code over its 120 epochs: 0 to epoch 50, 1 to 90, then 2."""
    return 0 if epoch <= 50 else 1 if epoch <= 90 else 2


class FAT(Objective):
    """Friendly adversarial training: cross-entropy on examples whose attack stopped tau fooled
    iterates after the first.

    Args:
        attack: a `FriendlyPGD`; its `tau` is set at each step.
        tau: a number, or a function of the epoch (from 1); None keeps the attack's own.
            `fat_tau` is the official schedule.

    Source: Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger",
    ICML 2020. The official code adds 0.001 N(0, 1) after each step: FriendlyPGD(omega=0.001).
    """

    def __init__(self, attack: FriendlyPGD, tau: int | Callable[[int], int] | None = None):
        if not isinstance(attack, FriendlyPGD):
            raise TypeError(f"FAT needs a FriendlyPGD, got {type(attack).__name__}")
        super().__init__(attack)
        self.tau = tau

    def prepare(self, epoch: int) -> None:
        super().prepare(epoch)
        if self.tau is not None:
            self.attack.tau = at_epoch(self.tau, epoch)


class GAIRATWeights:
    """w(kappa) with mean 1 over the batch from `begin_epoch` on, no weights before (the burn-in).
    See `ops.gairat_weights`."""

    def __init__(
        self, lam: Schedule = -1.0, kind: str = "tanh", begin_epoch: int = 1, int_half: bool = False
    ):
        self.lam = lam
        self.kind = kind
        self.begin_epoch = begin_epoch
        self.int_half = int_half

    def __call__(self, step: Step) -> Tensor | None:
        if step.epoch < self.begin_epoch:
            return None
        return ops.gairat_weights(
            step.kappa,
            step.attack.settings.steps,
            at_epoch(self.lam, step.epoch),
            self.kind,
            int_half=self.int_half,
        )


class GAIRAT(Objective):
    """Geometry-aware instance-reweighted adversarial training: samples that few PGD steps fool
    count more.

    Args:
        attack: a `PGD` whose kappa is the geometry value; a `FriendlyPGD` makes it GAIR-FAT.
        lam: the paper's lambda, a number or a function of the epoch; +inf gives every sample the
            same weight (AT).
        kind: "tanh" (the paper), "sigmoid" or "discrete".
        begin_epoch: first epoch (from 1) with weights; equal weights before. The paper begins after
            a burn-in of 30 of 100 epochs (ResNet-18) or 60 of 120 (WRN-32-10).
        int_half: the official code's integer K/2, which moves the centre for odd K.

    Robustness to PGD alone is no evidence for a reweighted model: evaluate it with the margin loss
    and AutoAttack too.

    Source: Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021,
    equation 6 and algorithms 1 and 2.
    """

    def __init__(
        self,
        attack: PGD,
        lam: Schedule = -1.0,
        kind: str = "tanh",
        begin_epoch: int = 1,
        int_half: bool = False,
    ):
        weighting = GAIRATWeights(lam, kind, begin_epoch, int_half)
        super().__init__(_needed(attack), weighting=weighting)


def _needed(attack: PGD | None) -> PGD:
    if attack is None:
        raise TypeError("this objective needs an attack, got None")
    return attack


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()
