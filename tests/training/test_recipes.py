"""Every recipe builds, makes a training step, and gives the run its settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pyadv import models
from pyadv.data import ImageData
from pyadv.training import Config, build, recipes
from pyadv.training.methods import METHODS
from pyadv.training.schedules import lr_factor


@pytest.fixture(scope="module")
def colour() -> ImageData:
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    return ImageData("cifar10", tuple("0123456789"), x, y, x, y)


@pytest.fixture(scope="module")
def grey() -> ImageData:
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8)
    return ImageData("fashion-mini", tuple("0123456789"), x, y, x, y)


@pytest.mark.parametrize("name", recipes.names())
def test_each_makes_a_step(name: str, colour: ImageData, grey: ImageData) -> None:
    recipe = recipes.load(name)
    data = grey if recipe.settings["data"] == "fashion-mini" else colour
    config = recipe.config().resolve(data)
    assert recipe.source and config.data == data.name
    for key, value in recipe.settings.items():
        if isinstance(value, (str, int, bool)) and "/" not in str(value):
            assert getattr(config, key) == value, key
    with torch.device("meta"):  # a step of the real network would take too long here
        models.create(**build.architecture(config, data))

    config = dataclasses.replace(config, steps=2)
    torch.manual_seed(0)
    model = models.create(**{**build.architecture(config, data), "name": "small-cnn"})
    objective = build.objective(config, model, data)
    loss = objective(model, data.train_x, data.train_y, epoch=config.epochs)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_there_is_one_for_each_method_of_the_papers() -> None:
    """Methods that we defined, or that have no published settings of their own, have none."""
    covered = {recipes.load(name).config().method for name in recipes.names()}
    assert set(METHODS) - covered == {"standard", "mail-mart", "gair-trades", "gair-mart"}


def test_milestones_are_in_epochs(colour: ImageData) -> None:
    """FAT and GAIRAT train at rate 0.1, from epoch 60 at 0.01, from 90 at 0.001, from 110 at
    0.0005."""
    c = recipes.load("gairat-wrn32-10-cifar10").config().resolve(colour)

    def lr(epoch: int) -> float:
        progress = (epoch - 1) * 391 / (c.epochs * 391)  # as the trainer counts
        return c.lr * lr_factor(c.schedule, progress, c.milestones, c.factors)

    rates = [lr(e) for e in (1, 59, 60, 89, 90, 109, 110, 120)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 5e-4, 5e-4])


def test_given_settings_override_the_recipe() -> None:
    recipe = recipes.load("gairat-wrn32-10-cifar10")
    config = recipe.config(epochs=200, model="small-cnn")
    assert (config.epochs, config.model, config.begin_epoch) == (200, "small-cnn", 60)
    # Settings that only GAIRAT has are dropped for another method.
    config = recipe.config(method="at")
    assert (config.begin_epoch, config.gairat_lam, config.eps) == (None, None, 0.031)
    config = recipes.load("trades-emr-wrn34-10-cifar10").config(method="mart")
    assert (config.attack_loss, config.beta) == (None, 12)


def test_own_recipes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('method = "trades"\neps = "4/255"\n')
    recipe = recipes.load(str(file))
    assert (recipe.name, recipe.source) == ("mine", "")
    assert recipe.config() == Config(method="trades", eps=4 / 255)
    for text, message in (
        ("epsilon = 1\nbta = 2", r"mine.toml: config has unknown settings \['bta', 'epsilon'\]"),
        ("epochs = 'x'", "mine.toml: epochs must be of type int"),
        ("eps = ", "mine.toml: "),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            recipes.load(str(file))
    with pytest.raises(ValueError, match="recipe must be one of at-awp.*got 'none'"):
        recipes.load("none")
