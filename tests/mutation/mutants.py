"""What a mutant is: our source with one error in it, and the tests that should notice."""

from __future__ import annotations

from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "plugins", "contrib/rlhf-freeze", "contrib/rlhf-ifeval", "contrib/rlhf-muon", "contrib/rlhf-opmd")
"""Folders of the repository that are copied, mutated and imported from."""


@attrs.frozen
class Mutant:
    """One planted error."""

    name: str
    file: str
    """From the repository's root."""
    source: str
    """The file with the error in it."""
    what: str
    tests: tuple[str, ...]
    """Test files, or tests as pytest names them, from the repository's root."""
    named: bool
    """Of the table of named errors, which must be noticed by a test, not by running past a limit of time."""


class TableError(Exception):
    """The table of errors doesn't fit the source, so that it would plant nothing, or something else."""


def replaced(source: str, old: str, new: str, where: str) -> str:
    """The source with a text replaced that it holds exactly once.

    Raises:
        TableError: it doesn't.
    """
    found = source.count(old)
    if found != 1:
        raise TableError(f"{where}: expected exactly once in the source, found {found} times: {old!r}")
    return source.replace(old, new)
