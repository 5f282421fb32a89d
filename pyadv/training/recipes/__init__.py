"""Published settings, one TOML file each: the keys are those of `Config`, and `source`.

Numbers may be fractions in quotes: eps = "8/255", or milestones in epochs, "59/120" for a drop
after epoch 59 of 120.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyadv.training.config import Config
from pyadv.training.methods import METHOD_SETTINGS, METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Settings by name, and where they are from."""

    name: str
    source: str
    settings: dict[str, Any]

    def config(self, **given: Any) -> Config:
        """The settings, with those `given` in their place. Another method leaves behind the
        settings that only the recipe's has."""
        kept = dict(self.settings)
        method = given.get("method")
        if method in METHODS:
            foreign = set(METHOD_SETTINGS) - METHODS[method].settings
            if method != self.settings["method"]:
                foreign.add("attack_loss")
            kept = {name: value for name, value in kept.items() if name not in foreign}
        return Config.from_dict({**kept, **given})


def names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def path(name: str) -> Path:
    """The file of a recipe that comes with the package, or `name` itself if it ends in .toml.

    Raises ValueError if there is none.
    """
    file = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not file.is_file():
        raise ValueError(
            f"recipe must be one of {', '.join(names())} or a .toml file, got {name!r}"
        )
    return file


def load(name: str) -> Recipe:
    """Read a recipe, see `path`. Raises ValueError for a file that is not one; the message names
    unknown keys."""
    file = path(name)
    try:
        settings = tomllib.loads(file.read_text())
        source = settings.pop("source", "")
        recipe = Recipe(file.stem, source, {"method": Config.method, **settings})
        recipe.config()
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    return recipe
