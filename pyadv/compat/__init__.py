"""The functions of the official training codes under their own names and with their own numbers.
Change one import line of a script and the rest stays:

    from trades import trades_loss     ->  from pyadv.compat.trades import trades_loss
    from mart import mart_loss         ->  from pyadv.compat.mart import mart_loss
    from mail_loss import *            ->  from pyadv.compat.mail import *
    from GAIR import GAIR              ->  from pyadv.compat.gairat import GAIR
    import attack_generator as attack  ->  from pyadv.compat import gairat as attack
    from earlystop import GA_earlystop ->  from pyadv.compat.gairat import GA_earlystop
    from earlystop import earlystop    ->  from pyadv.compat.fat import earlystop
    import torchattacks                ->  from pyadv.compat import torchattacks
    import foolbox                     ->  from pyadv.compat import foolbox
    from autoattack import AutoAttack  ->  from pyadv.compat.autoattack import AutoAttack

From the same torch and NumPy seeds the functions draw the same numbers, and their attacks
differentiate the official expressions. docs/differences.md lists the deliberate differences.
"""

from pyadv.compat import autoattack, emr, fat, foolbox, gairat, mail, mart, torchattacks, trades

__all__ = [
    "autoattack",
    "emr",
    "fat",
    "foolbox",
    "gairat",
    "mail",
    "mart",
    "torchattacks",
    "trades",
]
