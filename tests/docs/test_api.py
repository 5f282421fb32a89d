"""The API reference names every public name, once. It needs no mkdocs."""

from __future__ import annotations

import importlib
import re
import sys
import types

import pages
import pytest

API = pages.ROOT / "docs" / "api"
pytestmark = pytest.mark.skipif(not API.is_dir(), reason="not a checkout")

# page -> the modules that it documents
PAGES = {
    "index": ["pyadv"],
    "attacks": ["pyadv.attacks"],
    "objectives": ["pyadv.objectives"],
    "evaluation": ["pyadv.evaluation", "pyadv.evaluation.plots"],
    "training": ["pyadv.training", "pyadv.training.plots", "pyadv.training.recipes"],
    "models": ["pyadv.models"],
    "data": ["pyadv.data"],
    "engine": ["pyadv.engine"],
    "ops": ["pyadv.ops"],
    "reference": ["pyadv.reference"],
    "compat": [
        "pyadv.compat",
        "pyadv.compat.autoattack",
        "pyadv.compat.emr",
        "pyadv.compat.fat",
        "pyadv.compat.foolbox",
        "pyadv.compat.foolbox.attacks",
        "pyadv.compat.foolbox.criteria",
        "pyadv.compat.gairat",
        "pyadv.compat.mail",
        "pyadv.compat.mart",
        "pyadv.compat.torchattacks",
        "pyadv.compat.trades",
    ],
    "integrations": [
        "pyadv.integrations.hub",
        "pyadv.integrations.lightning",
        "pyadv.integrations.metrics",
        "pyadv.integrations.robustbench",
    ],
}


def directives(page: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", (API / f"{page}.md").read_text(), re.MULTILINE)


def resolve(path: str) -> object:
    """Return the object that a dotted path names; modules come before names that shadow them."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:n]) and not str(error).endswith("is not a package"):
                raise
            continue
        for name in parts[n:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def public(module: types.ModuleType) -> list[str]:
    """Return `__all__`, or what the module itself defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", own)


@pytest.mark.parametrize("page", PAGES)
def test_every_public_name_is_there(page):
    found = directives(page)
    assert len(found) == len(set(found))
    documented = [module for modules in PAGES.values() for module in modules]
    expected = set()
    for name in PAGES[page]:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.startswith("pyadv"):
                raise
            found = [d for d in found if not d.startswith(name)]  # its framework is not installed
            continue
        for member in public(module):
            value = getattr(module, member)
            if isinstance(value, types.ModuleType):
                assert value.__name__ in documented, f"{value.__name__} has no page"
            elif (page, member) != ("index", "evaluate"):  # the page of the evaluation has it
                expected.add((member, id(value)))
    assert {(d.rsplit(".", 1)[1], id(resolve(d))) for d in found} == expected


def test_every_page_is_known_and_in_the_navigation():
    assert {p.stem for p in API.glob("*.md")} == set(PAGES)
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    for page in sorted((pages.ROOT / "docs").rglob("*.md")):
        path = page.relative_to(pages.ROOT / "docs").as_posix()
        assert re.search(rf"[:-] {re.escape(path)}$", navigation, re.MULTILINE), path


def test_shadowed_modules_are_told_apart():
    assert resolve("pyadv.attacks.square.square") is sys.modules["pyadv.attacks"].square
    assert isinstance(resolve("pyadv.attacks.square"), types.ModuleType)
    assert resolve("pyadv.attacks.PGD") is sys.modules["pyadv.attacks"].PGD
