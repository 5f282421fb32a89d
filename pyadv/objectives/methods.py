"""The training methods of the papers, as combinations of attack, base loss, weighting and added
terms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyadv import ops
from pyadv.attacks import FriendlyPGD
from pyadv.engine import checks
from pyadv.engine.attack import Attack
from pyadv.menus import (
    WEIGHTED_BASES,
    WEIGHTED_TERMS,
    KappaWeightName,
    MarginName,
    MarginNormalize,
    WeightedBase,
    WeightedTerm,
)
from pyadv.objectives.objective import Objective, ascends_kl
from pyadv.objectives.step import Schedule, Step, at_epoch
from pyadv.objectives.terms import (
    MARTBCE,
    MARTKL,
    Mean,
    Scaled,
    Sum,
    Term,
    clean_cross_entropy,
    cross_entropy,
    trades_kl,
)
from pyadv.objectives.weighting import GAIRATWeights, MAILWeights, Weighting


class Standard(Objective):
    """Cross-entropy on the clean batch."""

    def __init__(self) -> None:
        super().__init__(None)


class AT(Objective):
    """Adversarial training: mean cross-entropy on the attack's examples.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
    2018.
    """

    def __init__(self, attack: Attack):
        super().__init__(_needed(attack))


class FAT(Objective):
    """Friendly adversarial training: cross-entropy on the examples of an early-stopped attack.

    FAT for TRADES and FAT for MART are those objectives with a `FriendlyPGD` and their own tau.

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
        super().__init__(attack, tau=tau)


class TRADES(Objective):
    """mean CE(f(x), y) + beta mean KL(f(x) || f(x_adv)), gradients through both.

    Args:
        attack: an attack with loss="kl" and a random start; it computes the natural logits once.
            With a `FriendlyPGD` the objective is FAT for TRADES.
        beta: a number, or a function of the epoch (from 1).
        tau: of a `FriendlyPGD`; the official schedule is `fat_trades_tau`.
        any_attack: allow an attack on another loss, such as the cross-entropy of EMR's code.
        ignore_index: label of samples that have none (robust self-training). They count in the KL
            term; in the mean of the cross-entropy they count as 0. An attack whose result depends
            on labels (a `FriendlyPGD`, best="fooled") judges them by the model's natural
            prediction.

    Source: Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML
    2019.
    """

    def __init__(
        self,
        attack: Attack,
        beta: Schedule = 6.0,
        tau: Schedule | None = None,
        any_attack: bool = False,
        ignore_index: int | None = None,
    ):
        super().__init__(
            _kl_attack(attack, any_attack),
            clean_cross_entropy,
            tau=tau,
            clean_first=True,
            ignore_index=ignore_index,
        )
        self.regularisers = (Mean(trades_kl, beta),)


class MART(Objective):
    """mean BCE(f(x_adv), y) + beta mean (1 - q_y) KL(f(x) || f(x_adv)), q = softmax f(x).

    Args:
        attack: an attack on the cross-entropy. With a `FriendlyPGD` the objective is FAT for MART.
        beta: a number, or a function of the epoch (from 1); the paper's lambda.
        tau: of a `FriendlyPGD`; the official schedule is `fat_mart_tau`.
        exact: the paper's formulas, without the small constants of the official code.
        detach_weight: let no gradient through 1 - q_y. In the official code it does flow.

    Source: Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples", ICLR 2020.
    """

    def __init__(
        self,
        attack: Attack,
        beta: Schedule = 5.0,
        tau: Schedule | None = None,
        exact: bool = False,
        detach_weight: bool = False,
        weighting: Weighting | None = None,
    ):
        super().__init__(_needed(attack), MARTBCE(exact), weighting, tau=tau, clean_first=True)
        self.regularisers = (Mean(MARTKL(exact, detach_weight), beta),)


class MAIL(Objective):
    """AT, TRADES or MART with weights that fall with the probabilistic margin:

    - "at": mean w CE(f(x_adv), y);
    - "trades": mean CE(f(x), y) + beta mean w KL;
    - "mart": mean w BCE + beta mean (1 - q_y) KL.

    Args:
        attack: an attack on the cross-entropy; for "trades" one with loss="kl".
        base: "at", "trades" or "mart".
        margin: "adv" (the official code), "nat", "dif" or "dif_conf"; the last two are readings of
            the paper's third margin. "dif_conf" grows with vulnerability and needs a negative
            slope. See `ops.probabilistic_margin`.
        slope, bias: of w = sigma(-slope (margin - bias)). The official runs have 10 and -0.5 for
            "at", 2 and 0 for "trades".
        beta: of "trades" and "mart".
        normalize: "mean" (weights of mean 1, the paper), "x3" (the official code) or "none".
        begin_epoch: first epoch (from 1) with weights; equal weights before. The official code
            begins at epoch 77 of 120: it counts from 0 and its first 76 epochs have no weights.
        tau, any_attack: see `TRADES`.

    Source: Liu et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training",
    NeurIPS 2021, and its official code.
    """

    def __init__(
        self,
        attack: Attack,
        base: WeightedBase = "at",
        margin: MarginName = "adv",
        slope: float = 10.0,
        bias: float = -0.5,
        beta: Schedule = 5.0,
        normalize: MarginNormalize = "mean",
        begin_epoch: int = 1,
        tau: Schedule | None = None,
        any_attack: bool = False,
    ):
        checks.choice("base", base, WEIGHTED_BASES)
        attack = _kl_attack(attack, any_attack) if base == "trades" else _needed(attack)
        parts: dict[WeightedBase, tuple[Term, tuple[Term, ...]]] = {
            "at": (cross_entropy, ()),
            "trades": (Scaled(trades_kl, beta), (Mean(clean_cross_entropy),)),
            "mart": (MARTBCE(), (Mean(MARTKL(), beta),)),
        }
        base_term, added = parts[base]
        clean_first = base != "at" or margin != "adv"
        weighting = MAILWeights(margin, slope, bias, normalize, begin_epoch)
        super().__init__(attack, base_term, weighting, tau=tau, clean_first=clean_first)
        self.regularisers = added


class GAIRAT(Objective):
    """Geometry-aware instance-reweighted adversarial training: AT in which samples that few PGD
    steps fool count more.

    Args:
        attack: a `PGD`, whose kappa is the geometry value. With a `FriendlyPGD` the objective is
            GAIR-FAT (the official code's lambda is then 0).
        lam: the paper's lambda, a number or a function of the epoch; +inf gives every sample the
            same weight (AT).
        kind: "tanh" (the paper), "sigmoid" or "discrete".
        begin_epoch: first epoch (from 1) with weights; equal weights before. The paper begins after
            a burn-in of 30 of 100 epochs (ResNet-18) or 60 of 120 (WRN-32-10).
        int_half: the official code's integer K/2, which moves the centre for odd K.
        tau: of a `FriendlyPGD`; the official schedule is `gair_fat_tau`.

    Robustness to PGD alone is no evidence for a reweighted model. Evaluate it with the margin loss
    and AutoAttack too.

    Source: Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021,
    equation 6 and algorithms 1 and 2.
    """

    def __init__(
        self,
        attack: Attack,
        lam: Schedule = -1.0,
        kind: KappaWeightName = "tanh",
        begin_epoch: int = 1,
        int_half: bool = False,
        tau: Schedule | None = None,
    ):
        weighting = GAIRATWeights(lam, kind, begin_epoch, int_half)
        super().__init__(_needed(attack), weighting=weighting, tau=tau)


class GAIRTRADES(Objective):
    """TRADES with GAIRAT's weights on the KL term, the cross-entropy or both. Our definition: the
    paper weighs TRADES in another way, and its authors name these three as possible.

    Args:
        attack: an attack with loss="kl"; kappa counts its iterates that are classified as y.
        weight_on: "kl", "ce" or "both".
        beta, tau: see `TRADES`.
        lam, kind, begin_epoch: see `GAIRAT`.
    """

    def __init__(
        self,
        attack: Attack,
        beta: Schedule = 6.0,
        weight_on: WeightedTerm = "kl",
        lam: Schedule = -1.0,
        kind: KappaWeightName = "tanh",
        begin_epoch: int = 1,
        tau: Schedule | None = None,
    ):
        checks.choice("weight_on", weight_on, WEIGHTED_TERMS)
        kl = Scaled(trades_kl, beta)
        parts: dict[WeightedTerm, tuple[Term, tuple[Term, ...]]] = {
            "kl": (kl, (Mean(clean_cross_entropy),)),
            "ce": (clean_cross_entropy, (Mean(kl),)),
            "both": (Sum(clean_cross_entropy, kl), ()),
        }
        base, added = parts[weight_on]
        weighting = GAIRATWeights(lam, kind, begin_epoch)
        super().__init__(_kl_attack(attack), base, weighting, tau=tau, clean_first=True)
        self.regularisers = added


class GAIRMART(MART):
    """MART with GAIRAT's weights on the boosted cross-entropy, as MAIL weighs it. Our definition:
    neither the paper nor its code has one.

    Args:
        attack, beta, tau: see `MART`.
        lam, kind, begin_epoch: see `GAIRAT`.
    """

    def __init__(
        self,
        attack: Attack,
        beta: Schedule = 5.0,
        lam: Schedule = -1.0,
        kind: KappaWeightName = "tanh",
        begin_epoch: int = 1,
        tau: Schedule | None = None,
    ):
        super().__init__(attack, beta, tau, weighting=GAIRATWeights(lam, kind, begin_epoch))


class GAIRRST(Objective):
    """Robust self-training with geometry: a margin attack for samples far from the boundary.

    mean CE(f(x), y) + beta mean [w KL(f(x) || f(x_kl)) + (1 - w) KL(f(x) || f(x_margin))], with
    w = (1 + tanh(lam + K/2 - kappa)) / 2, not normalised, where kappa is counted by the attack that
    finds x_kl. Both attacks run before the first forward pass in train mode. The passes come in the
    order of the official code: x_kl, x_margin, x.

    Half of a batch is labelled, half pseudo-labelled. Samples of label -1 count as 0 in the first
    term and have w = 1.

    Args:
        attack: an attack with loss="kl".
        margin_attack: an attack with loss="margin".
        beta: a number, or a function of the epoch (from 1).
        lam: a number, or a function of the epoch. Above 10 the objective is TRADES and the margin
            attack does not run, as in the official code, whose lambda is 100 in the first half of
            the training and 3 in the second.

    Source: Zhang et al., ICLR 2021, the official code for 500K unlabelled images.
    """

    def __init__(
        self,
        attack: Attack,
        margin_attack: Attack,
        beta: Schedule = 6.0,
        lam: Schedule = 3.0,
    ):
        base = _MixedKL(_kl_attack(attack), _needed(margin_attack), beta, lam)
        super().__init__(attack, base, ignore_index=-1)
        self.regularisers = (Mean(clean_cross_entropy),)


class _MixedKL:
    """beta (w KL at x_kl + (1 - w) KL at x_margin)."""

    PLAIN = 10.0  # lambda above which w = 1

    def __init__(self, attack: Attack, margin_attack: Attack, beta: Schedule, lam: Schedule):
        self.attack, self.margin_attack = attack, margin_attack
        self.beta, self.lam = beta, lam

    def attacks(self, epoch: int) -> tuple[Attack, ...]:
        return () if at_epoch(self.lam, epoch) > self.PLAIN else (self.margin_attack,)

    def __call__(self, step: Step) -> Tensor:
        lam, beta = at_epoch(self.lam, step.epoch), at_epoch(self.beta, step.epoch)
        step.need("logits_adv")
        if lam > self.PLAIN:
            return beta * trades_kl(step)
        if step.kappa is None:
            raise TypeError("this objective needs an attack, got None")
        logits_margin = step.forward(step.perturb(self.margin_attack).x_adv)
        steps = self.attack.settings.steps
        w = ops.gairat_weights(step.kappa, steps, lam, normalize="none", slope=steps / 2)
        w = torch.where(step.labelled, w, 1.0)
        margin_kl = ops.trades_kl(logits_margin, step.logits)
        return beta * (w * trades_kl(step) + (1 - w) * margin_kl)

    def state_dict(self) -> dict[str, int]:
        return self.margin_attack.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.margin_attack.load_state_dict(state)


def _needed(attack: Attack | None) -> Attack:
    if attack is None:
        raise TypeError("this objective needs an attack, got None")
    return attack


def _kl_attack(attack: Attack | None, any_attack: bool = False) -> Attack:
    if not any_attack and not ascends_kl(_needed(attack)):
        raise ValueError(
            'this objective needs an attack with loss="kl"; any_attack=True allows another, where '
            "the method has that argument"
        )
    return _needed(attack)
