"""Formats, each with one error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.api import Format, Problem, RequestError


class Lines(Format):
    """A prompt a line."""

    def lines(self, path: str) -> list[str]:
        try:
            return Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RequestError(Problem(f"{path}: is no text: {error}")) from error

    def read(self, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in enumerate(self.lines(path), 1):
            yield f"{path}:{number}", {"prompt": line}


class Losing(Lines):
    """Leaves the last line out."""

    def lines(self, path: str) -> list[str]:
        return super().lines(path)[:-1]


class Placeless(Lines):
    """Doesn't say which line."""

    def read(self, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for line in self.lines(path):
            yield "a line", {"prompt": line}


class Crashing(Lines):
    """Lets an error of Python's out."""

    def lines(self, path: str) -> list[str]:
        return Path(path).read_text(encoding="utf-8").splitlines()


class Unclaimed(Lines):
    """Right, but its entry claims another suffix."""
