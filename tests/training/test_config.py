"""Defaults follow from the data, rules are checked, and saved settings read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyadv.data import ImageData
from pyadv.models import SmallCNN
from pyadv.objectives import (
    AT,
    AWP,
    EMR,
    FAT,
    GAIRAT,
    GAIRMART,
    GAIRRST,
    GAIRTRADES,
    MAIL,
    MART,
    TRADES,
    NormPenalty,
    Objective,
    Standard,
)
from pyadv.training import Config, build
from pyadv.training.methods import METHOD_SETTINGS, METHODS
from pyadv.training.schedules import lr_factor

# Settings that no method and no data set gives a value.
OPTIONAL = {"weights", "mean", "std", "image_size", "stream", "workers", "transform", "log_with"}


def images(name: str, channels: int) -> ImageData:
    x, y = torch.rand(4, channels, 8, 8), torch.tensor([0, 1, 0, 1])
    return ImageData(name, ("a", "b"), x, y, x, y)


def objective(config: Config, data: ImageData) -> Objective:
    return build.objective(config, SmallCNN(*data.shape[:1], 2, data.shape[1:]), data)


@pytest.mark.parametrize(
    ("name", "channels", "model", "eps", "augment", "warmup"),
    [
        ("fashion-mini", 1, "small-cnn", 0.1, False, 0),
        ("mnist", 1, "small-cnn", 0.3, False, 5),
        ("anything", 3, "preact-resnet-18", 8 / 255, True, 0),
        ("svhn", 3, "preact-resnet-18", 8 / 255, False, 0),
    ],
)
def test_defaults_follow_from_the_data(
    name: str, channels: int, model: str, eps: float, augment: bool, warmup: int
) -> None:
    config = Config().resolve(images(name, channels))
    assert (config.model, config.eps, config.augment) == (model, eps, augment)
    assert config.alpha == eps / 4 and config.eps_warmup == warmup
    assert config.milestones == ((0.5, 0.75) if channels == 1 else (100 / 110, 105 / 110))
    unset = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None]
    assert set(unset) - OPTIONAL == set(METHOD_SETTINGS) - {"attack_loss"}
    assert config.attack_loss == "ce"


def test_what_is_given_stays() -> None:
    config = Config(eps=0.2, epochs=7, norm="l2", augment=True).resolve(images("x", 1))
    assert (config.eps, config.alpha, config.epochs, config.norm) == (0.2, 0.1, 7, "L2")
    assert config.augment is True and config.begin_epoch is None
    assert Config(method="gairat", epochs=7).resolve(images("x", 1)).begin_epoch == 3
    assert Config(eps_warmup=0).resolve(images("mnist", 1)).eps_warmup == 0


@pytest.mark.parametrize("name", ["alpha", "emr_temperature", "gairat_lam"])
def test_numbers_are_finite(name: str) -> None:
    values = [float("nan"), -float("inf")] + ([] if name == "gairat_lam" else [float("inf")])
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            Config(**{"method": "gairat", name: value}).resolve(images("x", 1))
    assert Config(method="gairat", gairat_lam=float("inf")).resolve(images("x", 1)).gairat_lam > 1


def test_a_misspelt_setting_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"settings \['epoch', 'zebra'\]; did you mean 'epochs'\?"):
        Config.from_dict({"epoch": 3, "zebra": "sgd"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "trade"}, "method must be one of standard, at, trades, .*got 'trade'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"norm": "L3"}, "norm must be Linf, L2 or L1"),
        ({"norm": "L2"}, "eps must be given for norm L2"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"lr": float("nan")}, "lr must be finite and > 0, got nan"),
        ({"lr": float("inf")}, "lr must be finite and > 0, got inf"),
        ({"eps": -0.1}, "eps must be finite and >= 0, got -0.1"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"seed": 2**31}, "seed must be in"),
        ({"emr": -1.0}, "emr must be finite and >= 0"),
        ({"val": -1}, "val must be >= 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"awp": -0.1}, "awp must be finite and >= 0"),
        ({"method": "trades", "beta": -1.0}, "beta must be finite and >= 0"),
        ({"beta": 6.0}, "beta is for the methods trades, mart, .*, got method 'at'"),
        ({"method": "trades", "tau": 1}, "tau is for the methods fat, .*got method 'trades'"),
        ({"method": "standard", "attack_loss": "ce"}, "attack_loss is for the methods at, "),
        ({"method": "gairat", "begin_epoch": 11}, "begin_epoch must be <= epochs.* 11 and 10"),
        ({"factors": (0.1,)}, "factors must be as many as milestones, got 1 and 2"),
        ({"factors": (0.1, float("nan"))}, r"factors must be shares of lr in \[0, 1\], got nan"),
        ({"factors": (75.0, 90.0)}, r"factors must be shares of lr in \[0, 1\], got 75"),
        ({"steps": 10**200}, r"steps must be below 2\^31, got 1000"),
        (
            {"milestones": [75, 90]},
            r"milestones must be shares of the run in \[0, 1\), got 75: write 75/100 for the end",
        ),
        ({"milestones": [0.9, 0.5]}, "milestones must rise, got 0.9, 0.5"),
        ({"milestones": [-0.1]}, r"milestones must be shares of the run .*got -0\.1"),
        ({"emr_milestones": (59,)}, "emr_milestones must be shares of the run .*got 59"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"eps": True}, "eps: True is not a number"),
    ],
)
def test_rules(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings).resolve(images("x", 1))


def test_round_trip(tmp_path: Path) -> None:
    config = Config(method="gairat", emr=0.1).resolve(images("x", 3))
    config.save(tmp_path / "config.json")
    read = json.loads((tmp_path / "config.json").read_text())
    assert Config.from_dict(read).resolve(images("x", 3)) == config
    with pytest.raises(ValueError, match=r"unknown settings \['epoch'\]"):
        Config.from_dict({"epoch": 3})


def test_settings_of_numpy_and_tensors_become_plain(tmp_path: Path) -> None:
    """Else neither JSON nor a checkpoint could hold them."""
    given = {"seed": np.int64(3), "epochs": np.int32(2), "eps": torch.tensor(0.25)}
    given |= {"lr": np.float64(0.5), "alpha": np.float32(0.125), "augment": np.bool_(True)}
    config = Config(**given, milestones=np.array([0.25, 0.5]), data=tmp_path).resolve(
        images("x", 1)
    )
    plain = {"seed": 3, "epochs": 2, "eps": 0.25, "lr": 0.5, "alpha": 0.125, "augment": True}
    plain |= {"milestones": (0.25, 0.5), "data": str(tmp_path)}
    for name, value in plain.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)
    config.save(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("schedule", "values"),  # at 0, 0.2, 0.4, 0.5, 0.75, 1
    [
        ("constant", (1, 1, 1, 1, 1, 1)),
        ("piecewise", (1, 1, 1, 0.1, 0.01, 0.01)),
        ("cosine", (1, 0.9045085, 0.6545085, 0.5, 0.1464466, 0)),
        ("cyclic", (0, 0.5, 1, 0.8333333, 0.4166667, 0)),
    ],
)
def test_schedules(schedule: str, values: tuple[float, ...]) -> None:
    seen = [lr_factor(schedule, p, (0.75, 0.5)) for p in (0, 0.2, 0.4, 0.5, 0.75, 1)]
    assert seen == pytest.approx(values, abs=1e-7)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be one of"):
        lr_factor("step", 0.5)


def test_factors() -> None:
    seen = [lr_factor("piecewise", p, (0.5, 0.75), (0.3, 0.2)) for p in (0, 0.5, 0.7, 0.75, 1)]
    assert seen == [1, 0.3, 0.3, 0.2, 0.2]


KINDS = {
    "standard": Standard,
    "at": AT,
    "fat": FAT,
    "gairat": GAIRAT,
    "gair-fat": GAIRAT,
    "trades": TRADES,
    "fat-trades": TRADES,
    "mart": MART,
    "fat-mart": MART,
    "mail-at": MAIL,
    "mail-trades": MAIL,
    "mail-mart": MAIL,
    "gair-trades": GAIRTRADES,
    "gair-mart": GAIRMART,
    "gair-rst": GAIRRST,
}


def test_every_method_is_known_here() -> None:
    assert set(KINDS) == set(METHODS)


@pytest.mark.parametrize("method", KINDS)
def test_objectives_are_built_as_configured(method: str) -> None:
    data = images("x", 1)
    config = Config(method=method, emr=0.5, eps=0.2, start="uniform", speed="exact").resolve(data)
    assert config.resolve(data) == config
    made = objective(config, data)
    assert type(made) is KINDS[method]
    emr = made.regularisers[-1]
    assert isinstance(emr, EMR) and emr.lam == 0.5 and emr.temperature == 40
    if method != "standard":
        s = made.attack.settings
        assert (s.eps, s.alpha, s.steps, s.start, made.attack.seed) == (0.2, 0.05, 10, "uniform", 0)
        assert s.speed == "exact"
        assert s.loss.needs_reference_logits == (config.attack_loss == "kl")
        assert (config.attack_loss == "kl") == ("trades" in method or "rst" in method)
    assert (made.tau is not None) == ("fat" in method)
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    model = SmallCNN(1, 2, (8, 8))
    made(model, x, y, epoch=config.epochs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_settings_of_methods_reach_the_objective() -> None:
    data = images("x", 1)
    assert not objective(Config().resolve(data), data).regularisers
    gairat = objective(Config(method="gairat", epochs=100).resolve(data), data).weighting
    assert gairat.begin_epoch == 31 and gairat.lam == -1  # as in the paper
    gair_fat = objective(Config(method="gair-fat", gairat_lam=0.5).resolve(data), data)
    assert gair_fat.weighting.lam == 0.5
    for method in ("trades", "mart"):
        (kl,) = objective(Config(method=method, beta=2.5).resolve(data), data).regularisers
        assert kl.term.factor == 2.5
    given = {"mail_margin": "nat", "mail_slope": 3.0, "mail_bias": 0.1, "mail_normalize": "x3"}
    mail = objective(Config(method="mail-at", begin_epoch=4, **given).resolve(data), data).weighting
    assert (mail.margin, mail.slope, mail.bias, mail.normalize) == ("nat", 3.0, 0.1, "x3")
    assert mail.begin_epoch == 4


def test_what_is_added_to_any_method() -> None:
    data = images("x", 1)
    settings = {"emr": 2.0, "emr_milestones": (0.5, 0.9), "norm_penalty": 0.1, "awp": 0.01}
    made = objective(Config("trades", epochs=10, **settings).resolve(data), data)
    assert isinstance(made, AWP) and made.gamma == 0.01
    _, emr, norms = made.regularisers
    assert [emr.lam(e) for e in (1, 5, 6, 9, 10)] == pytest.approx([2, 2, 0.2, 0.2, 0.02])
    assert isinstance(norms, NormPenalty) and norms.lam == 0.1


def test_fat_schedule_is_the_official_one_stretched() -> None:
    data = images("x", 1)
    tau = objective(Config(method="fat", epochs=12).resolve(data), data).tau
    assert [tau(e) for e in range(1, 13)] == [0] * 5 + [1] * 4 + [2] * 3
    assert objective(Config(method="fat", tau=3).resolve(data), data).tau == 3


def test_plain_values_are_read_by_the_type_of_the_setting() -> None:
    config = Config.from_dict({"eps": "8/255", "lr": 1, "milestones": ["59/120", 0.75]})
    assert (config.eps, config.lr, config.milestones) == (8 / 255, 1.0, (59 / 120, 0.75))
    for values, message in (
        ({"eps": "a/b"}, "eps: 'a/b' is not a number or a fraction"),
        ({"milestones": 3}, "milestones: .*not iterable"),
        ({"milestones": "59"}, "milestones: '59' is not a list of numbers"),
        ({"epochs": "ten"}, "epochs must be of type int, got 'ten'"),
        ({"steps": 2.5}, "steps must be of type int"),
        ({"method": None}, "method must be of type str, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            Config.from_dict(values)
