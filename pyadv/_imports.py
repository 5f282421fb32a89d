"""Find what the user names as `package.module:attribute`."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_import_path(name: str) -> bool:
    """Return whether `name` has the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    return bool(colon and _PATH.fullmatch(module) and _PATH.fullmatch(attribute))


def find(name: str, argument: str) -> Any:
    """Import the object called `name`, "package.module:attribute".

    Modules are found as `python -m` finds them: in the current folder first. `argument` is the
    setting that holds the name, for the error message.

    Raises:
        ValueError: if the module or the attribute does not exist. An error that the module itself
            raises as it is imported is passed on.
    """
    if not is_import_path(name):
        raise ValueError(f"{argument} must have the form package.module:name, got {name!r}")
    module, _, attribute = name.partition(":")
    try:
        with current_folder_first():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            raise ValueError(
                f"{argument} {name!r}: there is no module {error.name!r} in the current folder or "
                "among the installed packages"
            ) from None
        raise
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ValueError(f"{argument} {name!r}: {module} has no {attribute!r}") from None
    return found


@contextlib.contextmanager
def current_folder_first() -> Iterator[None]:
    """Put the current folder first on the path of imports while the context lasts."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")
