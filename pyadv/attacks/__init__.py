"""Attacks: `attack(x, y)` gives adversarial examples, `attack.run(x, y)` an `AttackResult`."""

from pyadv.attacks._grid import to_uint8
from pyadv.attacks._result import AttackResult, Perturbed
from pyadv.attacks.apgd import APGD, TargetedAPGD, apgd, targeted_apgd
from pyadv.attacks.fgsm import FGSM, MIFGSM, fgsm, mifgsm
from pyadv.attacks.pgd import PGD, FriendlyPGD, PGDPlus, pgd
from pyadv.attacks.square import Square, square

__all__ = [
    "APGD",
    "FGSM",
    "MIFGSM",
    "PGD",
    "AttackResult",
    "FriendlyPGD",
    "PGDPlus",
    "Perturbed",
    "Square",
    "TargetedAPGD",
    "apgd",
    "fgsm",
    "mifgsm",
    "pgd",
    "square",
    "targeted_apgd",
    "to_uint8",
]
