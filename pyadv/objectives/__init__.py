"""Training objectives: `loss = objective(model, x, y, epoch=e)`."""

from pyadv.objectives.emr import EMR
from pyadv.objectives.objective import (
    AT,
    FAT,
    GAIRAT,
    GAIRATWeights,
    Objective,
    Standard,
    cross_entropy,
    fat_tau,
)

__all__ = [
    "AT",
    "EMR",
    "FAT",
    "GAIRAT",
    "GAIRATWeights",
    "Objective",
    "Standard",
    "cross_entropy",
    "fat_tau",
]
