"""Rows of text whose lengths are spread as in real data, made from a seed, or read from the user's files.

The words mean nothing: what a step costs goes by how many tokens there are and how unevenly they fall on the rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from stepbench.cases import Scale

Count = Callable[[str], int]
"""Tokens of a text."""

COLUMNS = {"sft": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
_WORDS = (
    "the of and to in is was for on that with as by at from it an are be this which or had not but have one new first "
    "their has its after who they two her she been other when time during there into all may would more years over "
    "only most made some between where known many through until later being used world about them work people number "
    "part under city name both before day year same around three since well while second group water small long house"
)
WORDS = _WORDS.split()


def text(random: Random, tokens: int, count: Count) -> str:
    """Words of at least so many tokens, few more. Begins with a blank, so that it can follow another text."""
    words: list[str] = []
    missing = tokens
    while missing > 0:
        words += random.choices(WORDS, k=max(1, missing // 8))
        missing = tokens - count(" " + " ".join(words))
    return " " + " ".join(words)


def length(random: Random, bounds: tuple[int, int]) -> int:
    """Log-normal between the bounds, two standard deviations wide on either side: many short ones, a long tail."""
    low, high = map(math.log, bounds)
    while True:
        drawn = random.gauss((low + high) / 2, (high - low) / 4)
        if low <= drawn <= high:
            return round(math.exp(drawn))


def rows(kind: str, scale: Scale, seed: int, count: Count) -> Iterator[dict[str, str]]:
    """Rows without end; none is longer than `scale.max_length`, its end token included.

    Args:
        kind: a key of `COLUMNS`.
        count: tokens of a text, in the model's tokenizer.
    """
    random = Random(f"{seed}/{kind}")
    while True:
        prompt = text(random, length(random, scale.prompt), count).lstrip()
        row = {"prompt": prompt}
        for column in COLUMNS[kind][1:]:
            row[column] = text(random, length(random, scale.completion), count)
        if fits(row, scale.max_length, count):
            yield row


def fits(row: Mapping[str, str], max_length: int, count: Count) -> bool:
    """Prompt, each completion and its end token are within the limit."""
    return all(count(row["prompt"] + part) + 1 <= max_length for name, part in row.items() if name != "prompt")


def read(path: Path, kind: str, max_length: int, count: Count) -> Iterator[dict[str, str]]:
    """The user's rows that fit, their other columns left out.

    Raises:
        ValueError: a line isn't a JSON object with text in the columns of this kind.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        columns = COLUMNS[kind]
        record: Any = json.loads(line)
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in columns):
            raise ValueError(f"{path}, line {number}: expected an object with text in {', '.join(columns)}")
        row = {name: record[name] for name in columns}
        if fits(row, max_length, count):
            yield row


def enough(found: Iterator[dict[str, str]], batch: int, steps: int, tokens: int | None, count: Count) -> list[Any]:
    """As many rows as the steps take, none of them twice.

    Args:
        tokens: of a packed item; None where an item is a row.

    Raises:
        ValueError: there are too few.
    """
    taken: list[dict[str, str]] = []
    held = 0
    for row in found:
        taken.append(row)
        held += count("".join(row.values())) + 1
        # Packing leaves little room free, and one item more than needed may be the half-empty last one.
        done = held >= (batch * steps + 2) * tokens if tokens else len(taken) >= batch * steps
        if done:
            return taken
    raise ValueError(f"{len(taken)} rows fit, too few for {steps} steps of {batch}")


def write(path: Path, content: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
