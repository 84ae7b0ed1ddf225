"""What a reward server is asked, and what it may answer. Version 1, JSON both ways; docs/how-to/rewards.md tells it.

    POST URL   {"version": 1, "items": [{"prompt": ..., "completion": "...", "columns": {...}}, ...]}
    200        {"scores": [0.5, {"score": 0.5, "parts": {"style": 1}}, {"error": "why it has none"}, ...]}

Nothing is taken on trust: another count, text, NaN or infinity in a number's place is refused. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import attrs

VERSION = 1
_NAME = re.compile(r"[A-Za-z][\w.-]{0,63}", re.ASCII)
_MOST_PARTS = 32


@attrs.frozen
class Scored:
    """One completion's score, higher is better, and what else the server tells of it."""

    score: float
    parts: Mapping[str, float] = attrs.Factory(dict)


@attrs.frozen
class Unscored:
    """The server has no score for it."""

    why: str


def question(items: list[dict[str, Any]]) -> bytes:
    """
    Raises:
        TypeError, ValueError: an item holds what JSON doesn't, such as a date or NaN.
    """
    return json.dumps({"version": VERSION, "items": items}, allow_nan=False).encode()


def answer(body: bytes, count: int) -> list[Scored | Unscored]:
    """Read the answer to a question of `count` items.

    Raises:
        ValueError: it is anything else; says what.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list):
        raise ValueError('no {"scores": [...]}')
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} items")
    return [_one(item, i) for i, item in enumerate(scores)]


def _one(item: Any, i: int) -> Scored | Unscored:
    if isinstance(item, dict) and isinstance(item.get("error"), str) and "score" not in item:
        return Unscored(item["error"])
    if not isinstance(item, dict):
        return Scored(_number(item, f"score {i}"))
    parts = item.get("parts", {})
    if not isinstance(parts, dict) or len(parts) > _MOST_PARTS:
        raise ValueError(f"score {i}: its parts are no object of {_MOST_PARTS} names at most")
    for name in parts:
        if not _NAME.fullmatch(name):
            raise ValueError(f"score {i}: a part is called {name!r}, not by letters, digits, _ . and -")
    found = {name: _number(value, f"score {i}, part {name}") for name, value in parts.items()}
    return Scored(_number(item.get("score"), f"score {i}"), found)


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {str(value)!r}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, not a finite number")
    return number
