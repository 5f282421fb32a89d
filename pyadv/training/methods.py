"""The table of training methods: what `--method NAME` minimises, and which settings it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyadv.attacks import PGD, FriendlyPGD
from pyadv.objectives import (
    AT,
    FAT,
    GAIRAT,
    GAIRMART,
    GAIRRST,
    GAIRTRADES,
    MAIL,
    MART,
    TRADES,
    Objective,
    Piecewise,
    Standard,
    fat_mart_tau,
    fat_tau,
    fat_trades_tau,
    gair_fat_tau,
)

if TYPE_CHECKING:
    from pyadv.training.config import Config

Tau = int | Callable[[int], int] | None


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        objective: from the attack (None without), the settings, and tau (None unless friendly).
        defaults: settings of `Config` that not all methods have, with their values.
        burn_in: share of the run with equal weights; None where no weights begin.
        tau: of a method with a friendly attack: its schedule, and the epochs this is written for.
        omega: noise after each step of the friendly attack.
    """

    objective: Callable[[Any, Config, Tau], Objective]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    burn_in: float | None = None
    tau: tuple[Piecewise, int] | None = None
    omega: float = 0.0

    @property
    def settings(self) -> set[str]:
        """The settings it has of those that not all methods have."""
        own = {"begin_epoch": self.burn_in is not None, "tau": self.tau is not None}
        return {*self.defaults, *(name for name, has in own.items() if has)}

    def resolved(self, epochs: int) -> dict[str, Any]:
        """Values of its settings in a run of `epochs`, where they are not given. tau stays None,
        which means the schedule."""
        if self.burn_in is None:
            return dict(self.defaults)
        return {**self.defaults, "begin_epoch": int(self.burn_in * epochs) + 1}

    def build(self, config: Config) -> Objective:
        """The objective of a resolved `config`, without what is added to any method."""
        if "attack_loss" not in self.defaults:
            return self.objective(None, config, None)
        attack = _attack_settings(config)
        if self.tau is None:
            return self.objective(PGD(**attack), config, None)
        tau = config.tau if config.tau is not None else _stretched(*self.tau, config.epochs)
        return self.objective(FriendlyPGD(omega=self.omega, **attack), config, tau)


def _attack_settings(config: Config) -> dict[str, Any]:
    """Return the settings of the attack of a resolved `config`, as arguments of `PGD`."""
    return {
        "norm": config.norm,
        "eps": config.eps,
        "alpha": config.alpha,
        "steps": config.steps,
        "loss": config.attack_loss,
        "start": config.start,
        "speed": _speed(config),
        "seed": config.seed,
    }


def _speed(config: Config) -> str:
    """ "fast" keeps to the arithmetic of the run."""
    return "bfloat16" if (config.speed, config.precision) == ("fast", "bf16") else config.speed


def _stretched(schedule: Piecewise, length: int, epochs: int) -> Callable[[int], int]:
    """A schedule written for `length` epochs, over `epochs`."""
    return lambda epoch: schedule(max(1, round(epoch * length / epochs)))


def _trades(attack: PGD, c: Config, tau: Tau) -> Objective:
    return TRADES(attack, c.beta, tau, any_attack=True)


def _mart(attack: PGD, c: Config, tau: Tau) -> Objective:
    return MART(attack, c.beta, tau)


def _gairat(attack: PGD, c: Config, tau: Tau) -> Objective:
    return GAIRAT(attack, c.gairat_lam, begin_epoch=c.begin_epoch, tau=tau)


def _gair_rst(attack: PGD, c: Config, tau: Tau) -> Objective:
    """Return GAIR-RST; its lambda is 100 before `begin_epoch`, which makes it TRADES."""
    margin_attack = PGD(**{**_attack_settings(c), "loss": "margin"})
    return GAIRRST(attack, margin_attack, c.beta, Piecewise(100.0, {c.begin_epoch: c.gairat_lam}))


def _mail(base: str) -> Callable[[PGD, Config, Tau], Objective]:
    return lambda attack, c, tau: MAIL(
        attack,
        base,
        c.mail_margin,
        c.mail_slope,
        c.mail_bias,
        normalize=c.mail_normalize,
        begin_epoch=c.begin_epoch,
        any_attack=True,
        **({} if base == "at" else {"beta": c.beta}),
    )


_CE, _KL = {"attack_loss": "ce"}, {"attack_loss": "kl"}
_GAIRAT = {"gairat_lam": -1.0}
_MAIL = {"mail_margin": "adv", "mail_slope": 10.0, "mail_bias": -0.5, "mail_normalize": "mean"}
_MAIL_BURN_IN = 76 / 120  # the official script counts epochs from 0 and weighs after number 75

METHODS = {
    "standard": Method(lambda attack, c, tau: Standard()),
    "at": Method(lambda attack, c, tau: AT(attack), _CE),
    "trades": Method(_trades, {**_KL, "beta": 6.0}),
    "mart": Method(_mart, {**_CE, "beta": 5.0}),
    "fat": Method(lambda attack, c, tau: FAT(attack, tau), _CE, tau=(fat_tau, 120), omega=0.001),
    "fat-trades": Method(_trades, {**_KL, "beta": 6.0}, tau=(fat_trades_tau, 85)),
    "fat-mart": Method(_mart, {**_CE, "beta": 6.0}, tau=(fat_mart_tau, 90)),
    "mail-at": Method(_mail("at"), {**_CE, **_MAIL}, _MAIL_BURN_IN),
    "mail-trades": Method(
        _mail("trades"),
        {**_KL, **_MAIL, "beta": 5.0, "mail_slope": 2.0, "mail_bias": 0.0},
        _MAIL_BURN_IN,
    ),
    "mail-mart": Method(
        _mail("mart"),
        {**_CE, **_MAIL, "beta": 5.0, "mail_slope": 2.0, "mail_bias": 0.0},
        _MAIL_BURN_IN,
    ),
    "gairat": Method(_gairat, {**_CE, **_GAIRAT}, 0.3),
    "gair-fat": Method(_gairat, {**_CE, "gairat_lam": 0.0}, 0.3, (gair_fat_tau, 120)),
    "gair-trades": Method(
        lambda attack, c, tau: GAIRTRADES(
            attack, c.beta, lam=c.gairat_lam, begin_epoch=c.begin_epoch
        ),
        {**_KL, **_GAIRAT, "beta": 6.0},
        0.3,
    ),
    "gair-mart": Method(
        lambda attack, c, tau: GAIRMART(attack, c.beta, c.gairat_lam, begin_epoch=c.begin_epoch),
        {**_CE, **_GAIRAT, "beta": 5.0},
        0.3,
    ),
    "gair-rst": Method(_gair_rst, {**_KL, "gairat_lam": 3.0, "beta": 6.0}, 99 / 200),
}

METHOD_SETTINGS = sorted(set().union(*(method.settings for method in METHODS.values())))
