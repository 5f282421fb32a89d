"""Published settings, one TOML file each, with the fields of `Config` and `source` as keys.

Numbers may be fractions in quotes: eps = "8/255". A milestone "59/120" is the end of epoch 59 of
120.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyadv._names import did_you_mean
from pyadv.training.config import Config
from pyadv.training.methods import METHOD_SETTINGS, METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Settings of a run and their source."""

    name: str
    source: str
    settings: dict[str, Any]

    def config(self, **given: Any) -> Config:
        """Return the settings, overridden by those `given`.

        Overriding `method` drops the recipe's attack loss and the settings only its method has.
        """
        kept = dict(self.settings)
        method = given.get("method")
        if method in METHODS:
            foreign = set(METHOD_SETTINGS) - METHODS[method].settings
            if method != self.settings["method"]:
                foreign.add("attack_loss")
            kept = {name: value for name, value in kept.items() if name not in foreign}
        return Config.from_dict({**kept, **given})


def names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def path(name: str) -> Path:
    """Return the file of the recipe `name`, or `name` itself if it ends in .toml.

    Raises ValueError if there is no such file.
    """
    file = Path(name) if name.endswith(".toml") else _FOLDER / f"{name}.toml"
    if not file.is_file():
        raise ValueError(
            f"recipe must be one of {', '.join(names())} or a .toml file, got {name!r}"
            f"{did_you_mean(name, names())}"
        )
    return file


def load(name: str) -> Recipe:
    """Read a recipe; see `path` for its name.

    Raises ValueError for a file that is not a recipe; the message names unknown keys.
    """
    file = path(name)
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
        source = settings.pop("source", "")
        recipe = Recipe(file.stem, source, {"method": Config.method, **settings})
        recipe.config()
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    return recipe
