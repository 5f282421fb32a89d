"""The names that arguments take, as types that an editor offers and a type checker reads, each with
its tuple for the check at run time."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Norm: TypeAlias = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = get_args(Norm)
AnyNorm: TypeAlias = Literal["Linf", "L2", "L1", "L0"]  # with the one that has no ball
ANY_NORMS: tuple[AnyNorm, ...] = get_args(AnyNorm)

BatchNormMode: TypeAlias = Literal["eval", "train", "as_is"]  # `bn`
BATCH_NORM_MODES: tuple[BatchNormMode, ...] = get_args(BatchNormMode)

Speed: TypeAlias = Literal["exact", "fast", "bfloat16"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)

# The losses that an attack maximises, and those of `ops.attack_loss`.
LossName: TypeAlias = Literal["ce", "margin", "dlr", "kl", "slm"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
TargetedLossName: TypeAlias = Literal["ce_targeted", "margin_targeted", "dlr_targeted"]
AttackLossName: TypeAlias = LossName | TargetedLossName
ATTACK_LOSSES: tuple[AttackLossName, ...] = (*LOSSES, *get_args(TargetedLossName))

GradMode: TypeAlias = Literal["fused", "autograd"]
GRAD_MODES: tuple[GradMode, ...] = get_args(GradMode)
Scale: TypeAlias = Literal["unit", "exact"]
SCALES: tuple[Scale, ...] = get_args(Scale)

StartName: TypeAlias = Literal["keyed", "uniform", "normal_small", "none"]
STARTS: tuple[StartName, ...] = get_args(StartName)
SphereStartName: TypeAlias = Literal["keyed", "generator", "none"]  # of APGD
SPHERE_STARTS: tuple[SphereStartName, ...] = get_args(SphereStartName)
AnyStartName: TypeAlias = StartName | SphereStartName | Literal["official"]  # of Square

Best: TypeAlias = Literal["last", "loss", "fooled"]
BESTS: tuple[Best, ...] = get_args(Best)
AnyBest: TypeAlias = Best | Literal["nearest"]  # which searches for minimum norms have

Auto: TypeAlias = Literal["auto"] | bool  # `compact`, `validate` and `graph`
AUTO: tuple[Auto, ...] = ("auto", True, False)

# Instance weights: GAIRAT's functions of kappa, MAIL's margins, and how weights are normalised.
KappaWeightName: TypeAlias = Literal["tanh", "sigmoid", "discrete"]
KAPPA_WEIGHTS: tuple[KappaWeightName, ...] = get_args(KappaWeightName)
KappaNormalize: TypeAlias = Literal["mean", "sum", "none"]
KAPPA_NORMALIZES: tuple[KappaNormalize, ...] = get_args(KappaNormalize)
MarginName: TypeAlias = Literal["nat", "adv", "dif", "dif_conf"]
MARGINS: tuple[MarginName, ...] = get_args(MarginName)
MarginNormalize: TypeAlias = Literal["mean", "x3", "none"]
MARGIN_NORMALIZES: tuple[MarginNormalize, ...] = get_args(MarginNormalize)

# Norms of weights, and the matrices that stand for a convolution.
WeightNorm: TypeAlias = Literal["frobenius", "spectral"]
WEIGHT_NORMS: tuple[WeightNorm, ...] = get_args(WeightNorm)
ConvMatrix: TypeAlias = Literal["reshape", "bound", "operator"]
CONV_MATRICES: tuple[ConvMatrix, ...] = get_args(ConvMatrix)

# Arguments of MAIL, GAIRTRADES and EMR.
WeightedBase: TypeAlias = Literal["at", "trades", "mart"]
WEIGHTED_BASES: tuple[WeightedBase, ...] = get_args(WeightedBase)
WeightedTerm: TypeAlias = Literal["kl", "ce", "both"]
WEIGHTED_TERMS: tuple[WeightedTerm, ...] = get_args(WeightedTerm)
Reduction: TypeAlias = Literal["mean", "official"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
PenaltyName: TypeAlias = Literal["softmax", "pairwise", "jacobian"]
PENALTIES: tuple[PenaltyName, ...] = get_args(PenaltyName)
Derivative: TypeAlias = Literal["tangent", "double", "difference"]
DERIVATIVES: tuple[Derivative, ...] = get_args(Derivative)
