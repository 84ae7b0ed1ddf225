"""Rows of data: read by formats, typed by row types, refused with a count and a reason, ordered by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import attrs
import numpy as np

from rlhf.errors import Problem, RequestError, RowError
from rlhf.interfaces import Context, Format
from rlhf.plan import DataSource
from rlhf.registry import resolve
from rlhf.rows import row_needs

T = TypeVar("T")
S = TypeVar("S")


@attrs.define
class Refusals:
    """Rows that were left out: how many for each reason, and where the first of them was."""

    counts: dict[str, int] = attrs.Factory(dict)
    first: dict[str, str] = attrs.Factory(dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self, most: int = 5) -> list[str]:
        """The commonest reasons, a line each."""
        ranked = sorted(self.counts.items(), key=lambda item: -item[1])
        lines = [f"{count} x {reason} (first: {self.first[reason]})" for reason, count in ranked[:most]]
        rest = sum(count for _, count in ranked[most:])
        return [*lines, f"{rest} x {len(ranked) - most} further reasons"] if rest else lines


@attrs.define
class Rows(Generic[T]):
    """Rows that fit, each with where it came from, and what was refused."""

    items: list[tuple[str, T]]
    refused: Refusals
    paths: tuple[str, ...]
    split: int = 0
    """Records that held several rows."""

    def __len__(self) -> int:
        return len(self.items)

    def convert(self, make: Callable[[T], S]) -> Rows[S]:
        """Turn each row into something else; a `RowError` refuses it."""
        kept: list[tuple[str, S]] = []
        refused = Refusals(dict(self.refused.counts), dict(self.refused.first))
        for where, row in self.items:
            try:
                kept.append((where, make(row)))
            except RowError as error:
                refused.add(str(error), where)
        return Rows(kept, refused, self.paths, self.split)

    def require(self, user: str, row_type: type, flag: str = "--data") -> Rows[T]:
        """These rows, if there are any.

        Args:
            flag: that they were given by.

        Raises:
            RequestError: none is left; says why and what is needed.
        """
        if self.items:
            return self
        what = f"{flag} {' '.join(self.paths)}: none of its {self.refused.total} rows can be used by {user}"
        cure = "columns of other names: --format.columns NAME_HERE=NAME_IN_THE_DATA"
        raise RequestError(Problem("\n    ".join([what, *self.refused.lines()]), f"{row_needs(row_type)}; {cure}"))

    def held_out(self, fraction: float, most: int, seed: int) -> tuple[Rows[T], Rows[T]]:
        """(rows to learn from, rows held out); the latter empty where there are too few rows to spare any. Rows of one
        record stay together."""
        places = list(dict.fromkeys(where for where, _ in self.items)) if self.split else range(len(self.items))
        count = min(int(len(places) * fraction), most)
        order = np.random.default_rng([seed, 0x5EED]).permutation(len(places))
        out = {places[i] for i in order[:count].tolist()}
        keys = (where if self.split else i for i, (where, _) in enumerate(self.items))
        parts: tuple[list[tuple[str, T]], list[tuple[str, T]]] = ([], [])
        for key, item in zip(keys, self.items, strict=True):
            parts[key in out].append(item)
        return Rows(parts[0], self.refused, self.paths, self.split), Rows(parts[1], Refusals(), self.paths)


def read(sources: Sequence[DataSource], row_type: type, context: Context) -> Rows[Any]:
    """Read every source and make typed rows.

    Raises:
        RequestError: a file can't be parsed.
    """
    items: list[tuple[str, Any]] = []
    refused, split = Refusals(), 0
    for source in sources:
        format_: Format = resolve(source.format)(source.format.config, context)
        for where, record in format_.read(source.path):
            try:
                if isinstance(record, RowError):
                    raise record
                several = getattr(row_type, "split", lambda record: None)(record)
                for one in [record] if several is None else several:
                    items.append((where, row_type.from_record(one)))  # type: ignore[attr-defined]
                split += several is not None
            except RowError as error:
                refused.add(str(error), where)
    return Rows(items, refused, tuple(source.path for source in sources), split)


@attrs.frozen
class Feed:
    """Which rows a step takes: a pure function of the seed and the step, and of how many rows were taken beside."""

    count: int
    batch_size: int
    seed: int
    steps: int

    @classmethod
    def of(cls, count: int, batch_size: int, seed: int, epochs: float, max_steps: int | None) -> Feed:
        """As many steps as asked for; else as many as `epochs` passes take, the last one perhaps smaller."""
        return cls(count, batch_size, seed, max_steps or -(-end_of(count, epochs) // batch_size))

    def rows(self, step: int, last: int | None = None, taken: int = 0) -> list[int]:
        """Row numbers of a step (from 0). Passes follow each other without a seam, each in an order of its own.

        Args:
            last: positions from here on are left out: the end of the data where a run goes by epochs.
            taken: rows beside their own that the steps before took: see `further`.
        """
        start = step * self.batch_size
        return self._at(start + taken, self._stop(step, last) + taken)

    def further(self, step: int, count: int, last: int | None = None, taken: int = 0) -> list[int]:
        """So many more rows for a step, those that come next; the following steps begin behind them. So a run that
        goes by epochs has the steps that it would have, and passes over the data more often.

        Args:
            taken: by the steps before, and by this one so far.
        """
        start = self._stop(step, last) + taken
        return self._at(start, start + count)

    def _stop(self, step: int, last: int | None) -> int:
        stop = (step + 1) * self.batch_size
        return stop if last is None else min(stop, last)

    def _at(self, start: int, stop: int) -> list[int]:
        found: list[int] = []
        for position in range(start, stop):
            number, offset = divmod(position, self.count)
            found.append(int(self._order(number)[offset]))
        return found

    def _order(self, number: int) -> np.ndarray[Any, Any]:
        return _permutation(self.seed, number, self.count)


def end_of(count: int, epochs: float) -> int:
    """How many positions so many passes have; one at least."""
    return max(1, round(epochs * count))


_orders: dict[tuple[int, int, int], np.ndarray[Any, Any]] = {}


def _permutation(seed: int, number: int, count: int) -> np.ndarray[Any, Any]:
    key = (seed, number, count)
    if key not in _orders:
        if len(_orders) > 4:
            _orders.clear()
        _orders[key] = np.random.default_rng([seed, number]).permutation(count)
    return _orders[key]


def derive(seed: int, *parts: int | str) -> int:
    """A seed for one purpose: the same for the same parts on any machine, unlike any other. 63 bits."""
    text = "/".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
