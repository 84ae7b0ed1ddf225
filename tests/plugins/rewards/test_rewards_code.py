"""The reward for programs: scores, what is counted, rows that are refused, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from at_work import Run, plan_of
from rlhf.compose import compose
from rlhf.errors import RequestError, RowError
from rlhf.facts import Machine
from rlhf.interfaces import Context, Failed
from rlhf.plan import Plan
from rlhf.registry import Registry
from rlhf.rows import PromptRow
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards.code import sandbox
from rlhf_plugins.rewards.code.entry import CodeConfig
from rlhf_plugins.rewards.code.reward import Code
from rlhf_plugins.rewards.code.sandbox import Verdict

DATA = Path(__file__).parent / "data" / "programs.jsonl"
RIGHT = "Here:\n```python\ndef f(x):\n    return x + 1\n```\n"
HALF = "```python\ndef f(x):\n    return 2\n```"
LATE = "```python\nimport time\ntime.sleep(60)\n```"
TESTS = "assert f(1) == 2\nassert f(2) == 3"
Rolled = Callable[..., Rollouts]


def make(**options: Any) -> Code:
    return Code(CodeConfig(**options), Context(cast(Plan, None), label="mine"))


def judge(reward: Code, rollouts: Rollouts) -> list[Any]:
    return reward.judge(rollouts, None)  # type: ignore[arg-type]


def test_scores_and_what_is_counted(rollouts: Rolled) -> None:
    texts = [RIGHT, HALF, LATE, "no program"]
    given = rollouts(texts, [{"tests": TESTS}] * 4)
    fraction, whole = make(wall_seconds=0.8, extract="fenced"), make(wall_seconds=0.8, extract="fenced", score="all")
    assert judge(fraction, given) == [1.0, 0.5, 0.0, 0.0]
    assert judge(whole, given) == [1.0, 0.0, 0.0, 0.0]
    assert fraction.context.metrics.drain(fraction.context.world) == {
        "reward/mine/no_program": 0.25, "reward/mine/late": 0.25,
    }  # fmt: skip
    assert judge(make(max_tests=1), rollouts([HALF], [{"tests": TESTS}])) == [1.0]


def test_the_same_program_is_run_once_and_one_that_could_not_be_run_has_failed(
    rollouts: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make(workers=1)
    asked: list[str] = []

    def verdict(program: str, case: Any) -> Verdict:
        asked.append(program)
        return Verdict("none", "no process could be started") if "2" in program else Verdict("passed")

    monkeypatch.setattr(mine._sandbox, "verdict", verdict)
    given = rollouts([RIGHT, HALF, RIGHT + "as I said"], [{"tests": TESTS}] * 3)
    assert judge(mine, given) == [1.0, Failed("no process could be started"), 1.0]
    assert len(asked) == 3  # two tests of the right one, and one of the other


def test_rows_without_tests_are_refused() -> None:
    mine = make()
    mine.check(PromptRow("p", {"tests": TESTS}))
    with pytest.raises(RowError, match="column 'tests': its tests assert nothing and call nothing"):
        mine.check(PromptRow("p", {"tests": "x = 1"}))


def test_where_programs_can_not_be_run_at_all_it_is_told_before_a_model_is_loaded() -> None:
    with pytest.raises(RequestError, match=r"--reward mine: .*\n    name an interpreter .*--reward.mine.python"):
        make(python="/bin/false")


def test_a_plan_says_whether_programs_are_isolated(
    typed: Any, installed: Registry, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(isolated: bool) -> str:
        monkeypatch.setattr(sandbox, "isolation", lambda python: (isolated, "" if isolated else "not permitted"))
        plan = compose(typed("--algo", "grpo", "--reward", "code"), installed, machine)
        (found,) = [note for note in plan.notes if note.startswith("--reward code")]
        return found

    assert "they have no network" in note(True) and "5 s of a processor, 512 MiB" in note(True)
    assert "NOT isolated (not permitted): they have this machine's network" in note(False)
    required = typed("--algo", "grpo", "--reward", "code", "--reward.code.isolation", "required")
    with pytest.raises(RequestError, match="isolation required: this machine doesn't permit it: not permitted"):
        compose(required, installed, machine)


@pytest.mark.matrix
def test_a_run_that_is_stopped_and_goes_on_has_the_same_numbers(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "algo": {"name": "grpo", "group_size": 4},
        "data": [str(DATA)],
        "reward": [{"name": "code", "wall_seconds": 5.0}, {"name": "length", "weight": 0.1}],
        "engine": {"name": "hf", "max_new_tokens": 6},
        "batch_size": 4,
        "max_steps": 2,
        "save_every": 1,
    }
    whole = Run(tmp_path / "whole", plan_of(**recipe))
    whole.go()
    assert any("1 refused" in line for line in whole.said) and len(whole.metrics()) == 2
    stopped = Run(tmp_path / "stopped", plan_of(**recipe))
    stopped.loop.steps = 1
    stopped.go()
    resumed = Run(tmp_path / "stopped", plan_of(**recipe))
    resumed.go(resume=True)
    assert resumed.metrics() == whole.metrics()
    assert all(0 < line["reward/code"] < 1 for line in whole.metrics())  # of each prompt's tests some can pass
