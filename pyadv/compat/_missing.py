"""Classes of other libraries that pyadv does not have: they can be imported, and not be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def missing_classes(module: str, nearest: Mapping[str, str]) -> Callable[[str], type]:
    """Return the `__getattr__` of `module` for the classes that are missing from it.

    An import of such a class works, so that a script that does not use it runs. Making an instance
    raises NotImplementedError with what is nearest.

    Args:
        nearest: name of the missing class -> what to use instead.
    """

    def __getattr__(name: str) -> type:
        if name not in nearest:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        def refuse(self: Any, *args: Any, **settings: Any) -> None:
            raise NotImplementedError(f"pyadv has no {name}; the nearest is {nearest[name]}")

        text = "An attack that pyadv does not have."
        return type(name, (), {"__init__": refuse, "__doc__": text, "__module__": module})

    return __getattr__
