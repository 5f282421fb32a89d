"""Attacks: `attack(x, y)` gives adversarial examples, `attack.run(x, y)` an `AttackResult`."""

from pyadv.attacks._result import AttackResult, Perturbed
from pyadv.attacks.pgd import PGD, FriendlyPGD, pgd

__all__ = ["PGD", "AttackResult", "FriendlyPGD", "Perturbed", "pgd"]
