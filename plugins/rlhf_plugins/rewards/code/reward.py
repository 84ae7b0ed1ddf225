"""Programs in responses, run against their rows' tests.

    score = share of the tests that pass, or 1 where all do, else 0; 0 where there is no program

A program that takes too long, or too much of anything, fails its test. Where it couldn't be run, for no fault of its,
the response has failed. Each test starts it anew, so no test depends on another, nor a verdict on what ran beside it.
`sandbox` says what holds a program back, and what doesn't.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs

from rlhf.api import Context, Failed, Problem, RequestError, Reward, Rollouts, RowError, Score
from rlhf_plugins.engines.asking import every
from rlhf_plugins.rewards import samples
from rlhf_plugins.rewards.code.cases import Case, read
from rlhf_plugins.rewards.code.programs import program
from rlhf_plugins.rewards.code.sandbox import Limits, Sandbox


@attrs.frozen
class Outcome:
    """Of one program against its tests."""

    passed: int
    count: int
    late: bool
    """It took too long for one of them."""
    broken: str = ""
    """Why it couldn't be run, where it couldn't."""


class Code(Reward):
    """See the module.

    Raises:
        RequestError: on construction, where programs can't be run here at all.
    """

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._label = context.label or "code"
        self._over = threading.Event()
        limits = Limits(
            seconds=config.seconds,
            wall_seconds=config.wall_seconds,
            memory=config.memory << 20,
            disk=config.disk << 20,
            processes=config.processes,
            files=config.files,
            output=config.output << 10,
        )
        self._sandbox = Sandbox(limits, python=config.python, over=self._over)
        flag = f"--reward.{self._label}"
        try:
            isolated, why = self._sandbox.isolated()
        except OSError as error:
            fix = f"name an interpreter that everybody can read: {flag}.python /usr/bin/python3"
            raise RequestError(Problem(f"--reward {self._label}: {error}", fix)) from error
        if config.isolation == "required" and not isolated:
            raise RequestError(Problem(f"{flag}.isolation required: this machine doesn't permit it: {why}"))

    def check(self, row: Any) -> None:
        """
        Raises:
            RowError: it holds no tests.
        """
        self._tests(row.extra)

    def judge(self, rollouts: Rollouts, score: Score) -> list[float | Failed]:
        """B scores from 0 to 1; Failed where a program couldn't be run."""
        asked: list[tuple[str, tuple[Case, ...]] | None] = []
        for i, text in enumerate(rollouts.texts):
            found = program(text, self.config.extract)
            asked.append(None if found is None else (found, self._tests(samples.columns(rollouts, i))))
        different = list(dict.fromkeys(one for one in asked if one is not None))  # the same program fares the same
        ran = every([partial(self._outcome, *one) for one in different], self.config.workers, self._over)
        outcomes = dict(zip(different, ran, strict=True))
        given = [None if one is None else outcomes[one] for one in asked]
        for outcome in given:
            self.context.metrics.mean(f"reward/{self._label}/no_program", float(outcome is None))
            self.context.metrics.mean(f"reward/{self._label}/late", float(outcome is not None and outcome.late))
        return [self._score(outcome) for outcome in given]

    def _outcome(self, source: str, tests: Sequence[Case]) -> Outcome:
        passed, late = 0, False
        for test in tests:
            verdict = self._sandbox.verdict(source, test)
            if verdict.what == "none":
                return Outcome(passed, len(tests), late, verdict.why)
            passed += verdict.what == "passed"
            late = late or verdict.what == "late"
            if self.config.score == "all" and verdict.what != "passed":
                break
        return Outcome(passed, len(tests), late)

    def _score(self, outcome: Outcome | None) -> float | Failed:
        if outcome is None:
            return 0.0
        if outcome.broken:
            return Failed(outcome.broken)
        if self.config.score == "all":
            return float(outcome.passed == outcome.count)
        return outcome.passed / outcome.count

    def _tests(self, columns: Any) -> tuple[Case, ...]:
        column = self.config.tests_column
        try:
            return read(columns.get(column))[: self.config.max_tests]
        except ValueError as error:
            raise RowError(f"column {column!r}: {error}") from error
