"""What the core asks of rewards beside their verdicts: to look at rows before a run, and to free what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from at_work import Run, plan_of
from rlhf.assemble import _check_of_rewards
from rlhf.errors import RowError
from rlhf.interfaces import Context, Reward
from rlhf.plan import Plan
from rlhf.rollouts import Source
from rlhf.rows import PromptRow


class Fussy(Reward):
    def check(self, row: Any) -> None:
        if row.extra["answer"] == "?":
            raise RowError("no answer")


def test_a_row_is_refused_by_any_reward_and_by_name() -> None:
    context = Context(cast(Plan, None))
    sources = [Source("plain", 1.0, Reward(None, context)), Source("fussy", 1.0, Fussy(None, context))]
    check = _check_of_rewards(sources, {"answer": "fussy"})
    check(PromptRow("p", {"answer": "4"}))
    with pytest.raises(RowError, match=r"^reward 'fussy': no answer$"):
        check(PromptRow("p", {"answer": "?"}))
    with pytest.raises(RowError, match="no column 'answer', which reward 'fussy' needs; its other columns: key"):
        check(PromptRow("p", {"key": "4"}))  # columns first: what a reward looks at is there


def test_rewards_are_closed_with_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(algo="ppo", reward=["answer", "length"]))
    closed: list[str] = []
    assert run.parts.sampler is not None
    for source in run.parts.sampler.sources:
        source.reward.close = lambda name=source.name: closed.append(name)  # type: ignore[method-assign, misc]
    run.parts.close()
    assert closed == ["answer", "length"]
