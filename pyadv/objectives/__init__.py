"""Training objectives: `loss = objective(model, x, y, epoch=e)`."""

from pyadv.objectives.awp import AWP
from pyadv.objectives.emr import EMR
from pyadv.objectives.methods import (
    AT,
    FAT,
    GAIRAT,
    GAIRMART,
    GAIRRST,
    GAIRTRADES,
    MAIL,
    MART,
    TRADES,
    Standard,
)
from pyadv.objectives.norm_penalty import NormPenalty
from pyadv.objectives.objective import MicroBatches, Objective
from pyadv.objectives.schedules import (
    Linear,
    Piecewise,
    fat_mart_tau,
    fat_tau,
    fat_trades_tau,
    gair_fat_tau,
)
from pyadv.objectives.step import Step, at_epoch
from pyadv.objectives.terms import (
    MARTBCE,
    MARTKL,
    Mean,
    Scaled,
    Sum,
    clean_cross_entropy,
    cross_entropy,
    trades_kl,
)
from pyadv.objectives.weighting import GAIRATWeights, MAILWeights, Weighting

__all__ = [
    "AT",
    "AWP",
    "EMR",
    "FAT",
    "GAIRAT",
    "GAIRATWeights",
    "GAIRMART",
    "GAIRRST",
    "GAIRTRADES",
    "Linear",
    "MAIL",
    "MAILWeights",
    "MART",
    "MARTBCE",
    "MARTKL",
    "Mean",
    "MicroBatches",
    "NormPenalty",
    "Objective",
    "Piecewise",
    "Scaled",
    "Standard",
    "Step",
    "Sum",
    "TRADES",
    "Weighting",
    "at_epoch",
    "clean_cross_entropy",
    "cross_entropy",
    "fat_mart_tau",
    "fat_tau",
    "fat_trades_tau",
    "gair_fat_tau",
    "trades_kl",
]
