"""Options of components: attrs fields that carry their help, unit and source, and are checked where they are made.

@attrs.frozen(kw_only=True)
class TemperedConfig:
    group_size: int = option(8, help="completions per prompt", gt=0)
"""

from __future__ import annotations

import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import cattrs

from rlhf.errors import Problem

_KEY = "rlhf"


@attrs.frozen
class OptionInfo:
    """What the command line and the reference tell of an option."""

    help: str
    unit: str = ""
    source: str = ""
    choices: tuple[str, ...] = ()
    bounds: str = ""
    """Of a number: ">= 0, < 1"."""

    def text(self) -> str:
        parts = [self.help + (f": {' | '.join(self.choices)}" if self.choices else "")]
        if self.unit:
            parts.append(f"[{self.unit}]")
        if self.source:
            parts.append(f"({self.source})")
        return " ".join(parts)


def option(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    unit: str = "",
    source: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """An attrs field of a config class.

    Args:
        default: the value where the user says nothing; left out, the option is required.
        help: one line, what it does and when to change it.
        unit: of the value: "tokens", "nats", "seconds", ...
        source: where the definition or the default comes from.
        ge, gt, le, lt: bounds of a number; None passes them.
        choices: the legal words; of a list, for each of its items.
    """
    choices = tuple(choices)
    given = ((ge, operator.ge, ">="), (gt, operator.gt, ">"), (le, operator.le, "<="), (lt, operator.lt, "<"))
    bounds = [(bound, holds, sign) for bound, holds, sign in given if bound is not None]

    def check(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is None:
            return
        for bound, holds, sign in bounds:
            if not holds(value, bound):
                raise ValueError(f"must be {sign} {bound:g}, not {value!r}")
        for word in value if isinstance(value, tuple) else (value,):
            if choices and word not in choices:
                near = nearest(str(word), choices)
                hint = f"; did you mean {near!r}?" if near else ""
                raise ValueError(f"must be one of {', '.join(choices)}, not {word!r}{hint}")

    about = OptionInfo(help, unit, source, choices, ", ".join(f"{sign} {bound:g}" for bound, _, sign in bounds))
    return attrs.field(default=default, validator=check, metadata={_KEY: about}, kw_only=True)


def info(field: attrs.Attribute[Any]) -> OptionInfo:
    """The help of a field; a field made without `option` has an empty one."""
    found: OptionInfo = field.metadata.get(_KEY, OptionInfo(""))
    return found


def default_of(field: attrs.Attribute[Any]) -> Any:
    """The value where the user says nothing; `attrs.NOTHING` for an option that is required."""
    default: Any = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def fields(config: type) -> Mapping[str, attrs.Attribute[Any]]:
    """The option fields of a config class by name, their types resolved."""
    return _fields(config)


@functools.cache  # a table of plans asks for the same ones by the ten thousand
def _fields(config: type) -> Mapping[str, attrs.Attribute[Any]]:
    attrs.resolve_types(config)
    return types.MappingProxyType({field.name: field for field in attrs.fields(config)})


def type_name(kind: Any) -> str:
    """How a type is written in help and messages: int, float, text, yes/no, list of text, ..."""
    names = {int: "int", float: "number", str: "text", bool: "true/false"}
    if kind in names:
        return names[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args if a is not type(None))
    if origin is tuple and Ellipsis not in args:
        return ",".join(type_name(arg) for arg in args)
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    if origin in (dict, Mapping) or kind is dict:
        return "key=value list"
    return getattr(kind, "__name__", str(kind))


def nearest(given: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name most like `given`, or None when nothing is alike. Initials are alike: lr is learning_rate. What is
    one letter away goes before the rest: gpro is grpo rather than gspo."""
    lowered = {name.lower(): name for name in known}
    short = [name for name in lowered if "".join(word[:1] for word in re.split(r"[-_]", name)) == given.lower()]
    if len(short) == 1 and len(given) > 1 and given.lower() not in lowered:
        return lowered[short[0]]
    found = difflib.get_close_matches(given.lower(), lowered, n=max(1, len(lowered)), cutoff=cutoff)
    one_off = [name for name in found if one_letter(given.lower(), name)] if given.lower() not in found else []
    return next((lowered[name] for name in one_off + found), None)


def one_letter(a: str, b: str) -> bool:
    """One letter more, less or other, or two that changed places."""
    short, long = sorted((a, b), key=len)
    if len(short) < len(long):
        return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))
    other = [i for i in range(len(a)) if len(a) == len(b) and a[i] != b[i]]
    crossed = len(other) == 2 and other[1] == other[0] + 1 and a[other[0]] == b[other[1]] and a[other[1]] == b[other[0]]
    return len(other) == 1 or crossed


def convert(value: Any, kind: Any) -> Any:
    """Turn what YAML or the command line gave into `kind`, strictly: no silent truncation, no "false" read as true.

    Raises:
        ValueError: the value is not of that type; says what was expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        reasons = []
        for arm in (a for a in args if a is not type(None)):
            try:
                return convert(value, arm)
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(reasons[0])
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                try:
                    if float(value).is_integer():
                        return int(float(value))  # 1e3
                except (ValueError, OverflowError):
                    pass
    elif kind is float:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                pass
            else:
                if math.isfinite(number):  # "no bound" is said with none; infinity and NaN pass every comparison
                    return number
    elif kind is str:
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    elif origin in (tuple, list):
        # Blanks around the commas of a command line mean nothing; those of a YAML list, and line breaks, are meant.
        items = [item.strip(" ") for item in value.split(",") if value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and origin is tuple and Ellipsis not in args:
            if len(items) == len(args):
                return tuple(convert(item, arg) for item, arg in zip(items, args, strict=True))
        elif isinstance(items, list | tuple):
            return tuple(convert(item, args[0]) for item in items)
    elif origin in (dict, Mapping):
        if isinstance(value, str):
            pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
            if all(sign for _, sign, _ in pairs):
                value = {key.strip(): text.strip() for key, _, text in pairs}
        if isinstance(value, Mapping):
            return {convert(key, args[0]): convert(item, args[1]) for key, item in value.items()}
    else:
        try:
            return cattrs.structure(value, kind)
        except Exception as error:  # cattrs raises many kinds, and a plugin's own hook any
            raise ValueError(f"must be {type_name(kind)}, not {value!r}: {error}") from error
    raise ValueError(f"must be {type_name(kind)}, not {value!r}")


def structure(config: type | None, given: Mapping[str, Any], flag: str) -> tuple[Any, list[Problem]]:
    """Make a config from what the user gave, with every problem in it.

    Args:
        config: an attrs class, or None for a component without options.
        given: option name to raw value.
        flag: how the option is written on the command line up to its name, such as "--algo." or "--mem.lora.".

    Returns:
        (the config, []) or (None, problems).
    """
    known = fields(config) if config is not None else {}
    problems, values = [], {}
    written = {name: name.replace("_", "-") for name in known}
    for name, raw in given.items():
        field = known.get(name.replace("-", "_"))
        if field is None:
            near = nearest(name, known)
            fix = (
                f"did you mean {flag}{written[near]}?"
                if near
                else f"its options: {', '.join(written.values()) or 'none'}"
            )
            problems.append(Problem(f"unknown option {flag}{name.replace('_', '-')}", fix))
            continue
        try:
            values[field.name] = convert(raw, field.type)
            if field.validator is not None:
                field.validator(None, field, values[field.name])
        except (ValueError, TypeError) as error:
            problems.append(Problem(f"{flag}{written[field.name]} {error}", info(field).text()))
    for name, field in known.items():
        if field.default is attrs.NOTHING and name not in values and name not in {n.replace("-", "_") for n in given}:
            problems.append(Problem(f"{flag}{written[name]} is required", info(field).text()))
    if problems or config is None:
        return None, problems
    try:
        return config(**values), []
    except (ValueError, TypeError) as error:  # a validator across fields, in __attrs_post_init__
        return None, [Problem(f"{flag.rstrip('.')}: {error}")]


def typed(value: Any) -> str:
    """A value as it is typed on the command line; nothing at all is none."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={typed(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)
