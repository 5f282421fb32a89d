"""Defaults follow from the data, rules are checked, and what is saved reads back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pyadv.data import ImageData
from pyadv.objectives import AT, EMR, FAT, GAIRAT, Standard
from pyadv.training import Config, build
from pyadv.training.schedules import lr_factor


def images(name: str, channels: int) -> ImageData:
    x, y = torch.rand(4, channels, 8, 8), torch.tensor([0, 1, 0, 1])
    return ImageData(name, ("a", "b"), x, y, x, y)


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
    assert unset == ["tau"]


def test_what_is_given_stays() -> None:
    config = Config(eps=0.2, epochs=7, norm="l2", augment=True).resolve(images("x", 1))
    assert (config.eps, config.alpha, config.epochs, config.norm) == (0.2, 0.05, 7, "L2")
    assert config.augment is True and config.begin_epoch == 3
    assert Config(eps_warmup=0).resolve(images("mnist", 1)).eps_warmup == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "trade"}, "method must be one of standard, at, fat, gairat, got 'trade'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"norm": "L3"}, "norm must be Linf, L2 or L1"),
        ({"norm": "L2"}, "eps must be given for norm L2"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"seed": 2**31}, "seed must be in"),
        ({"emr": -1.0}, "emr must be >= 0"),
        ({"val": -1}, "val must be >= 0"),
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


def test_objectives_are_built_as_configured() -> None:
    data = images("x", 1)
    kinds = {"standard": Standard, "at": AT, "fat": FAT, "gairat": GAIRAT}
    for method, kind in kinds.items():
        objective = build.objective(Config(method=method, emr=0.5, eps=0.2).resolve(data))
        assert type(objective) is kind
        (emr,) = objective.regularisers
        assert isinstance(emr, EMR) and emr.lam == 0.5 and emr.temperature == 40
        if method != "standard":
            s = objective.attack.settings
            assert (s.eps, s.alpha, s.steps, objective.attack.seed) == (0.2, 0.05, 10, 0)
    assert not build.objective(Config().resolve(data)).regularisers
    gairat = build.objective(Config(method="gairat", epochs=100).resolve(data))
    assert gairat.weighting.begin_epoch == 31 and gairat.weighting.lam == -1  # the paper's


def test_fat_schedule_is_the_official_one_stretched() -> None:
    tau = build.objective(Config(method="fat", epochs=12).resolve(images("x", 1))).tau
    assert [tau(e) for e in range(1, 13)] == [0] * 5 + [1] * 4 + [2] * 3
    assert build.objective(Config(method="fat", tau=3).resolve(images("x", 1))).tau == 3
