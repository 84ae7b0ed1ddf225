"""Whether the fields of an entry hold what they are declared to hold: a plugin's author may not use mypy, and what is
wrong with one entry must not be found by a command that has nothing to do with it."""

from __future__ import annotations

import collections.abc
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import attrs

from rlhf import entries
from rlhf.planning import footprint

_UNSEEN = {**vars(footprint), **dict.fromkeys(("Plan", "Component", "Problem"), Any)}
"""Names that `entries` has for mypy alone. What a function takes isn't looked at."""


def ill_typed(entry: object, declared: type) -> str:
    """The first field of an entry that isn't of its type, told to its author; empty where all are.

    Args:
        declared: the class of `rlhf.entries` whose fields count, of which the entry's own may be a subclass.
    """
    for name, (kind, written) in _fields(declared).items():
        value = getattr(entry, name)
        if not _fits(value, kind):
            return f"{name} must be {written}, not {value!r}"
    return ""


@functools.cache
def _fields(declared: type) -> dict[str, tuple[Any, str]]:
    """Field -> its type, and how the class writes it."""
    kinds = typing.get_type_hints(declared, vars(entries), _UNSEEN)
    return {field.name: (kinds[field.name], str(field.type)) for field in attrs.fields(declared)}


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in args)
    if origin is typing.Literal:
        return value in args
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is tuple:  # a list does as well
        whole = isinstance(value, list | tuple)
        if Ellipsis in args:
            return whole and all(_fits(item, args[0]) for item in value)
        return whole and len(value) == len(args) and all(map(_fits, value, args))
    if origin is frozenset:
        return isinstance(value, frozenset) and all(_fits(item, args[0]) for item in value)
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if kind is int or kind is str:
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, kind)
