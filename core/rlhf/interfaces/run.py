"""What a run reads and who hears of it: formats and trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.component import Component
from rlhf.errors import RowError
from rlhf.sequences import Rollouts


class Format(Component):
    """Reads data into records with the canonical keys of `rlhf.rows`."""

    def read(self, path: str) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
        """(where, record) for each row; `where` is "file:line" or "file, row i".

        Raises:
            RequestError: the file can't be parsed; names file and line.

        A row whose shape is broken may be yielded as `(where, RowError(...))`; it is refused and counted.
        """
        raise NotImplementedError  # abstract: each implementation has its own


class Tracker(Component):
    """Hears of the run. One that fails is reported and dropped; the run goes on."""

    def run_started(self, run: Mapping[str, Any]) -> None:
        """`run`: directory (absolute), shown (the same as it was typed), plan, steps, first_step (steps done before: 0,
        or the checkpoint's), notes. The steps of the other events count from 1."""

    def rollout_finished(self, step: int, rollouts: Rollouts) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def checkpoint_saved(self, step: int, path: Path) -> None: ...

    def run_finished(self, summary: Mapping[str, Any], error: BaseException | None) -> None: ...
