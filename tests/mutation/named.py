"""Errors by name: what people who write such code get wrong, planted one by one.

Each replaces a text that its file must hold exactly once, so that the table can't rot unnoticed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import named_algorithms
import named_contrib
import named_core
import named_engines
import named_kit
import named_models
import named_preferences
import named_rewards
import named_samples
import named_without_critic
from mutants import ROOT, Mutant, TableError, replaced


class Named(NamedTuple):
    """A row of a table."""

    name: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    """Where not those of the whole file."""


TABLES = (
    *named_algorithms.TABLES,
    *named_preferences.TABLES,
    *named_samples.TABLES,
    *named_rewards.TABLES,
    *named_without_critic.TABLES,
    *named_models.TABLES,
    *named_core.TABLES,
    *named_engines.TABLES,
    *named_contrib.TABLES,
    *named_kit.TABLES,
)
"""(file, the tests that should notice, rows)"""


def mutants() -> Iterator[Mutant]:
    """Raises: TableError, with every row whose text isn't in its file exactly once, or whose error is no Python."""
    found: list[Mutant] = []
    problems: list[str] = []
    for file, tests, rows in TABLES:
        source = (ROOT / file).read_text(encoding="utf-8")
        for row in (Named(*row) for row in rows):
            try:
                mutated = replaced(source, row.old, row.new, f"{file}, {row.name!r}")
                ast.parse(mutated)
            except (TableError, SyntaxError) as error:
                problems.append(str(error))
                continue
            found.append(Mutant(row.name, file, mutated, row.what, row.tests or tests, named=True))
    problems += [f"two errors are called {name!r}" for name in _twice(mutant.name for mutant in found)]
    if problems:
        raise TableError("\n".join(problems))
    yield from found


def _twice(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
