"""The interface of foolbox for PyTorch models:

    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD()
    raw, clipped, success = attack(fmodel, images, labels, epsilons=[0.01, 0.03])

docs/differences.md lists the deliberate differences.
"""

from pyadv.compat.foolbox import attacks, criteria
from pyadv.compat.foolbox.attacks import Attack
from pyadv.compat.foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from pyadv.compat.foolbox.models import Bounds, PyTorchModel, accuracy

__all__ = [
    "Attack",
    "Bounds",
    "Criterion",
    "Misclassification",
    "PyTorchModel",
    "TargetedMisclassification",
    "accuracy",
    "attacks",
    "criteria",
]
