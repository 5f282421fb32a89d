"""Attacks: `attack(x, y)` returns adversarial examples, `attack.run(x, y)` an `AttackResult`."""

from pyadv.attacks.apgd import APGD, TargetedAPGD, apgd, targeted_apgd
from pyadv.attacks.autoattack import AutoAttack, EnsembleResult, Parity
from pyadv.attacks.cw import CW, cw
from pyadv.attacks.ddn import DDN, ddn
from pyadv.attacks.deepfool import DeepFool, deepfool
from pyadv.attacks.fab import FAB, TargetedFAB, fab, targeted_fab
from pyadv.attacks.fgsm import FGSM, MIFGSM, fgsm, mifgsm
from pyadv.attacks.fmn import FMN, fmn
from pyadv.attacks.pgd import PGD, FriendlyPGD, PGDPlus, pgd
from pyadv.attacks.pgd0 import PGD0, pgd0
from pyadv.attacks.processes import ProcessFailed
from pyadv.attacks.sigma_zero import SigmaZero, sigma_zero
from pyadv.attacks.square import Square, square
from pyadv.attacks.to_uint8 import to_uint8
from pyadv.attacks.transfer import (
    DIFGSM,
    NIFGSM,
    SINIFGSM,
    TIFGSM,
    VMIFGSM,
    VNIFGSM,
    Admix,
    TransferFGSM,
    transfer_fgsm,
)
from pyadv.engine.results import AttackResult, MinimumNormResult, Perturbed
from pyadv.passes.view import FastView, fast_view

__all__ = [
    "APGD",
    "CW",
    "DDN",
    "DIFGSM",
    "FAB",
    "FGSM",
    "FMN",
    "FastView",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "PGD0",
    "Admix",
    "AttackResult",
    "AutoAttack",
    "EnsembleResult",
    "DeepFool",
    "FriendlyPGD",
    "MinimumNormResult",
    "PGDPlus",
    "Parity",
    "Perturbed",
    "ProcessFailed",
    "SINIFGSM",
    "SigmaZero",
    "Square",
    "TIFGSM",
    "TargetedAPGD",
    "TargetedFAB",
    "TransferFGSM",
    "VMIFGSM",
    "VNIFGSM",
    "apgd",
    "cw",
    "ddn",
    "deepfool",
    "fab",
    "fast_view",
    "fgsm",
    "fmn",
    "mifgsm",
    "pgd",
    "pgd0",
    "sigma_zero",
    "square",
    "targeted_apgd",
    "targeted_fab",
    "to_uint8",
    "transfer_fgsm",
]
