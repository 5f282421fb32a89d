"""The training methods that `--method NAME` names: their objectives, settings and defaults.

This module does not know `Config`: a method takes the settings of a run as a mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyadv.attacks import PGD, FriendlyPGD
from pyadv.menus import Speed, WeightedBase
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

Tau = int | Callable[[int], int] | None
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        objective: makes the objective of the attack (None if the method has none), the settings of
            the run, and tau (None unless the attack is friendly).
        defaults: settings that not all methods have, with their default values.
        burn_in: share of the run with equal weights; None if the method never weights.
        tau: the schedule of a friendly attack, and the number of epochs it was written for.
        omega: noise after each step of the friendly attack.
    """

    objective: Callable[[Any, Settings, Tau], Objective]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    burn_in: float | None = None
    tau: tuple[Piecewise, int] | None = None
    omega: float = 0.0

    @property
    def settings(self) -> set[str]:
        """The names of its settings that not all methods have."""
        own = {"begin_epoch": self.burn_in is not None, "tau": self.tau is not None}
        return {*self.defaults, *(name for name, has in own.items() if has)}

    def resolved(self, epochs: int) -> dict[str, Any]:
        """Return the defaults of its settings in a run of `epochs` epochs.

        tau is not among them: None means the official schedule.
        """
        if self.burn_in is None:
            return dict(self.defaults)
        return {**self.defaults, "begin_epoch": int(self.burn_in * epochs) + 1}

    def build(self, s: Settings) -> Objective:
        """Return the objective for the settings `s` of a resolved `Config`.

        Terms that go with any method, such as EMR, are not part of it.
        """
        if "attack_loss" not in self.defaults:
            return self.objective(None, s, None)
        attack = _attack_settings(s)
        if self.tau is None:
            return self.objective(PGD(**attack), s, None)
        tau = s["tau"] if s["tau"] is not None else _stretched(*self.tau, s["epochs"])
        return self.objective(FriendlyPGD(omega=self.omega, **attack), s, tau)


def _attack_settings(s: Settings) -> dict[str, Any]:
    """Return the settings of the attack of a resolved `Config`, as arguments of `PGD`."""
    same = ("norm", "eps", "alpha", "steps", "start", "seed")
    speed = _speed(s["speed"], s["precision"])
    return {"loss": s["attack_loss"], "speed": speed, **{name: s[name] for name in same}}


def _speed(speed: Speed, precision: str) -> Speed:
    """Return the attack's speed; in a bf16 run "fast" means bfloat16."""
    return "bfloat16" if (speed, precision) == ("fast", "bf16") else speed


def _stretched(schedule: Piecewise, length: int, epochs: int) -> Callable[[int], int]:
    """Stretch a schedule for `length` epochs over `epochs` epochs."""
    return lambda epoch: int(schedule(max(1, round(epoch * length / epochs))))


def _trades(attack: PGD, s: Settings, tau: Tau) -> Objective:
    return TRADES(attack, s["beta"], tau, any_attack=True)


def _mart(attack: PGD, s: Settings, tau: Tau) -> Objective:
    return MART(attack, s["beta"], tau)


def _gairat(attack: PGD, s: Settings, tau: Tau) -> Objective:
    return GAIRAT(attack, s["gairat_lam"], begin_epoch=s["begin_epoch"], tau=tau)


def _gair_rst(attack: PGD, s: Settings, tau: Tau) -> Objective:
    """Return GAIR-RST; its lambda is 100 before `begin_epoch`, which makes it TRADES."""
    margin_attack = PGD(**{**_attack_settings(s), "loss": "margin"})
    lam = Piecewise(100.0, {s["begin_epoch"]: s["gairat_lam"]})
    return GAIRRST(attack, margin_attack, s["beta"], lam)


def _mail(base: WeightedBase) -> Callable[[PGD, Settings, Tau], Objective]:
    return lambda attack, s, tau: MAIL(
        attack,
        base,
        s["mail_margin"],
        s["mail_slope"],
        s["mail_bias"],
        normalize=s["mail_normalize"],
        begin_epoch=s["begin_epoch"],
        any_attack=True,
        **({} if base == "at" else {"beta": s["beta"]}),
    )


_CE, _KL = {"attack_loss": "ce"}, {"attack_loss": "kl"}
_GAIRAT = {"gairat_lam": -1.0}
_MAIL = {"mail_margin": "adv", "mail_slope": 10.0, "mail_bias": -0.5, "mail_normalize": "mean"}
_MAIL_BURN_IN = 76 / 120  # the official script counts epochs from 0 and weighs after number 75

METHODS = {
    "standard": Method(lambda attack, s, tau: Standard()),
    "at": Method(lambda attack, s, tau: AT(attack), _CE),
    "trades": Method(_trades, {**_KL, "beta": 6.0}),
    "mart": Method(_mart, {**_CE, "beta": 5.0}),
    "fat": Method(lambda attack, s, tau: FAT(attack, tau), _CE, tau=(fat_tau, 120), omega=0.001),
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
        lambda attack, s, tau: GAIRTRADES(
            attack, s["beta"], lam=s["gairat_lam"], begin_epoch=s["begin_epoch"]
        ),
        {**_KL, **_GAIRAT, "beta": 6.0},
        0.3,
    ),
    "gair-mart": Method(
        lambda attack, s, tau: GAIRMART(
            attack, s["beta"], s["gairat_lam"], begin_epoch=s["begin_epoch"]
        ),
        {**_CE, **_GAIRAT, "beta": 5.0},
        0.3,
    ),
    "gair-rst": Method(_gair_rst, {**_KL, "gairat_lam": 3.0, "beta": 6.0}, 99 / 200),
}

METHOD_SETTINGS = sorted(set().union(*(method.settings for method in METHODS.values())))
