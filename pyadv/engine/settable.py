"""Objects whose settings can be changed after construction, under the checks of the constructor."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from pyadv._names import did_you_mean

_Self = TypeVar("_Self", bound="Settable")
_PLAIN = frozenset({"model"})  # arguments without a check, and without effect on others


class _Model:
    """The place of the model among the arguments that an object keeps."""


class _Construction(ABCMeta):
    """Notes the arguments of each constructor call, and with that the end of construction."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if isinstance(made, Settable):
            model = made.__dict__.get("model")
            if model is not None:  # which may be replaced later, and must not stay alive then
                args = tuple(_Model if a is model else a for a in args)
                kwargs = {k: _Model if v is model else v for k, v in kwargs.items()}
            made.__dict__["_arguments"] = args, kwargs
            made._settled(None)
        return made


class Setting:
    """An attribute that reads a value of `attack.settings`; assignment goes through `Settable`.

    Args:
        path: where the value is, from the attack on.
    """

    def __init__(self, path: str):
        self.path = path.split(".")

    def __get__(self, attack: Any, owner: type) -> Any:
        if attack is None:
            return self
        value = attack
        for name in self.path:
            value = getattr(value, name)
        return value


class Settable(metaclass=_Construction):
    """The base of objects whose constructor arguments are attributes too.

    An assignment to such an attribute has the effect of constructing the object with that argument:
    the constructor checks the value, and whatever it derives from the value follows. `with_` does
    so on a copy. An attribute that neither a class of the object nor its constructor defines cannot
    be set afterwards: it would be a setting that is misspelt.

    A constructor runs twice for each change, so it should do no more than check and store.
    """

    def with_(self: _Self, **changes: Any) -> _Self:
        """Return a copy with other settings, under the checks of the constructor. The copy shares
        the model.

        Raises:
            TypeError: for a name that is no argument of the constructor.
            ValueError, TypeError: for a value that the constructor refuses.
        """
        known = parameters(type(self))
        for name in changes:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no setting {name!r}{did_you_mean(name, known)}"
                )
        changed = copy(self)
        for name in _PLAIN & changes.keys():
            changed.__dict__[name] = changes.pop(name)
        changed._change(changes)
        return changed

    def __setattr__(self, name: str, value: Any) -> None:
        if "_arguments" not in self.__dict__ or name in _PLAIN:
            object.__setattr__(self, name, value)
        elif name in parameters(type(self)):
            self._change({name: value})
        elif name in self.__dict__:
            object.__setattr__(self, name, value)
        elif isinstance(inspect.getattr_static(type(self), name, None), Setting):
            raise AttributeError(f"{type(self).__name__} has no argument {name!r}: it is fixed")
        elif _defined(type(self), name):
            object.__setattr__(self, name, value)
        else:
            hint = did_you_mean(name, (*parameters(type(self)), *self.__dict__))
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}{hint}; an attribute of your "
                "own must be set in __init__ or declared in the class"
            )

    def _settled(self, changes: dict[str, Any] | None) -> None:
        """Called after construction, with None, and after each change."""

    def _change(self, changes: dict[str, Any]) -> None:
        """Take over from an object with these arguments whatever differs from one without them."""
        if not changes:
            return
        args, kwargs = self._named_arguments()
        before = self._constructed(args, kwargs)
        kwargs = {**kwargs, **changes}
        after = self._constructed(args, kwargs)
        for name, value in vars(after).items():
            if name == "settings":
                object.__setattr__(self, name, self._merged(vars(before)[name], value, changes))
            elif name not in _PLAIN and not _same(value, vars(before).get(name)):
                object.__setattr__(self, name, value)
        self.__dict__["_arguments"] = args, kwargs
        self._settled(changes)

    def _merged(self, before: Any, after: Any, changes: dict[str, Any]) -> Any:
        """Return the present settings with what differs between `before` and `after`."""
        now = vars(self)["settings"]
        if type(now) is not type(after) or not is_dataclass(after):
            return after
        values = {f.name: getattr(after, f.name) for f in fields(after)}
        return replace(
            now,
            **{
                name: value
                for name, value in values.items()
                if name in changes or not _same(value, getattr(before, name))
            },
        )

    def _constructed(self: _Self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Self:
        model = self.__dict__.get("model")
        args = tuple(model if a is _Model else a for a in args)
        kwargs = {k: model if v is _Model else v for k, v in kwargs.items()}
        return type.__call__(type(self), *args, **kwargs)  # without the end of construction

    def _named_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the constructor, by name as far as they have one."""
        args, kwargs = vars(self)["_arguments"]
        own = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        named = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(named) or any(p.kind is p.POSITIONAL_ONLY for p in own):
            return args, kwargs
        return (), {**dict(zip(named, args, strict=False)), **kwargs}


@lru_cache
def parameters(kind: type) -> tuple[str, ...]:
    """Return the names of a constructor's arguments, with those that go on to a base class."""
    names: list[str] = []
    for owner in (c for c in kind.__mro__ if "__init__" in vars(c)):
        own = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names += [p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return tuple(dict.fromkeys(names))


def _defined(kind: type, name: str) -> bool:
    return any(name in vars(c) or name in vars(c).get("__annotations__", {}) for c in kind.__mro__)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are known to be equal. Tensors are equal to themselves alone."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # tensors inside
        return False
