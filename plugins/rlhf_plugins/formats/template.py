"""Prompt templates: text with `{column}` in it. Light: the configuration checks its template with this."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from rlhf.api import RowError


def columns_of(template: str) -> tuple[str, ...]:
    """The columns a template names, in order.

    Only plain names: an attribute or an index would reach into Python objects, a format specification would hide how
    a value is written.

    Raises:
        ValueError: braces don't match, or hold something else than a column's name.
    """
    double = "; a brace that is meant is doubled: {{ }}"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} can't be read: {error}{double}") from None
    names = []
    for _, name, specification, conversion in parts:
        if name is None:  # text at the end
            continue
        if not name or set(name) & set(".[]{}\"'\n") or specification or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            raise ValueError(f"the template holds {{{written}}}, which is no column's name{double}")
        names.append(name)
    if not names:
        raise ValueError(f"the template {template!r} names no column, so every prompt would be the same")
    return tuple(dict.fromkeys(names))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The prompt of a row. What the values hold, braces too, is text.

    Raises:
        RowError: a column is missing, or neither text nor a number.
    """
    out = []
    for text, name, _, _ in string.Formatter().parse(template):
        out.append(text)
        if name is None:
            continue
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            what = f"holds a {type(value).__name__}" if value is not None else "is missing"
            raise RowError(f"the template's column {name!r} {what}; it needs text or a number")
        out.append(str(value))
    return "".join(out)
