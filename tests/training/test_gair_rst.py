"""GAIR-RST as a method of the trainer: its two attacks are set, warmed up and resumed alike."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pyadv import training
from pyadv.data import ImageData
from pyadv.objectives import GAIRRST
from pyadv.training import Config, Display, Interrupted, Trainer, build, checkpoint, recipes
from pyadv.training.methods import METHODS

QUIET = Display(quiet=True)
SETTINGS = {"method": "gair-rst", "epochs": 3, "batch_size": 32, "steps": 2, "lr": 0.05}


def parts(config: Config, data: ImageData) -> GAIRRST:
    return build.objective(config.resolve(data), torch.nn.Linear(1, 1), data)


def test_settings_reach_both_attacks(small: ImageData) -> None:
    config = Config(method="gair-rst", eps=0.2, start="uniform", speed="exact", seed=3, beta=2.5)
    made = parts(config, small)
    first, second = made.attacks(config.resolve(small).epochs)
    assert (first.settings.loss.loss, second.settings.loss.loss) == ("kl", "margin")
    for a in (first, second):
        s = a.settings
        assert (s.eps, s.alpha, s.steps, s.start, s.speed) == (0.2, 0.05, 10, "uniform", "exact")
        assert a.seed == 3
    assert made.base.beta == 2.5


def test_the_margin_attack_begins_at_half_of_the_run(small: ImageData) -> None:
    made = parts(Config(method="gair-rst", epochs=200), small)
    assert [made.base.lam(e) for e in (1, 99, 100, 200)] == [100, 100, 3, 3]
    assert len(made.attacks(99)) == 1 and len(made.attacks(100)) == 2
    made = parts(Config(method="gair-rst", epochs=200, begin_epoch=7, gairat_lam=-1.0), small)
    assert [made.base.lam(e) for e in (6, 7)] == [100, -1]
    recipe = recipes.load("gair-rst-wrn28-10-cifar10").config()
    assert (recipe.begin_epoch, recipe.gairat_lam, recipe.start) == (100, 3, "normal_small")


def test_mail_begins_at_epoch_77_of_120() -> None:
    """The official script counts from 0, and weighs once its number is above 75."""
    official = [number + 1 for number in range(120) if not number <= 75]
    for method in ("mail-at", "mail-trades", "mail-mart"):
        assert METHODS[method].resolved(120)["begin_epoch"] == official[0] == 77


@pytest.mark.parametrize("awp", [0.0, 0.01])
def test_both_radii_warm_up(small: ImageData, tmp_path: Path, monkeypatch, awp: float) -> None:
    seen = set()
    count = Trainer._count

    def record(self: Trainer, *args: Any) -> None:
        attacks = self.objective.attacks(self.epoch)
        seen.add((self.epoch, *(round(a.settings.eps, 9) for a in attacks)))
        count(self, *args)

    monkeypatch.setattr(Trainer, "_count", record)
    config = Config(**SETTINGS, awp=awp, eps=0.09, eps_warmup=3, begin_epoch=2)
    training.train(config, tmp_path / "run", data=small, device="cpu", display=QUIET)
    assert seen == {(1, 0.03), (2, 0.06, 0.06), (3, 0.09, 0.09)}


def test_resumed_equals_uninterrupted(small: ImageData, tmp_path: Path, monkeypatch) -> None:
    """The draws of both attacks are part of the state."""
    config = Config(**SETTINGS, begin_epoch=2)
    training.train(config, tmp_path / "whole", data=small, device="cpu", display=QUIET)
    count, done = Trainer._count, []

    def stop(self: Trainer, *args: Any) -> None:
        done.append(1)
        if len(done) == 6:
            signal.raise_signal(signal.SIGINT)
        count(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_count", stop)
        training.train(config, tmp_path / "cut", data=small, device="cpu", display=QUIET)
    training.resume(tmp_path / "cut", data=small, device="cpu", display=QUIET)
    whole, cut = (checkpoint.load(tmp_path / f / "checkpoint.pt") for f in ("whole", "cut"))
    assert whole["objective"] == cut["objective"]
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name
