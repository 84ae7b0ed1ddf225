"""Answers compared by value, in processes that can be ended: verdicts, references that can't be read, and what happens
to comparisons that never end and to processes that are killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from rlhf import data
from rlhf import registry as registries
from rlhf.assemble import _check_of_rewards
from rlhf.compose import compose
from rlhf.errors import RequestError, RowError
from rlhf.facts import Machine
from rlhf.interfaces import Context, Failed
from rlhf.plan import Plan
from rlhf.registry import Registry
from rlhf.rollouts import Source
from rlhf.rows import PromptRow
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards.math.entry import MathConfig
from rlhf_plugins.rewards.math.pool import Lost, Pool, Undecided
from rlhf_plugins.rewards.math.reward import Math

Rolled = Callable[..., Rollouts]
ENDLESS = "9^{9^{9^{9}}}"
"""So many digits that no machine writes them down."""


def make(**options: Any) -> Math:
    return Math(MathConfig(**options), Context(cast(Plan, None), label="mine"))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    found = Pool(2, 20.0)
    yield found
    found.close()


@pytest.fixture
def reward(pool: Pool) -> Callable[..., Math]:
    """One whose processes are there already."""

    def with_pool(**options: Any) -> Math:
        found = make(**options)
        found._pool = pool
        return found

    return with_pool


def judge(reward: Math, rollouts: Rollouts) -> list[Any]:
    return reward.judge(rollouts, None)  # type: ignore[arg-type]


VERDICTS = [
    # reference, response, whether they are equal
    ("39", " 39", True),
    ("39", " 93", False),
    ("72", "I get 73, or rather 72.", True),
    ("72", "I get 72, or rather 73.", False),
    ("long work\n#### 1,234", "so 1234", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}, not \frac{1}{3}", True),
    ("x+1", r"\boxed{1+x}", True),
    ("x+1", r"\boxed{1-x}", False),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
    ("2^{10}", r"\boxed{1024}", True),
    ("2^{10}", r"\boxed{2}", False),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("[0,1)", r"\boxed{(0,1)}", False),
    ("5", "no idea", False),
    ("5", "", False),
    ("5", r"\boxed{", False),
    (3, "3.0", True),
]


def test_verdicts(reward: Callable[..., Math], rollouts: Rolled) -> None:
    given = rollouts([text for _, text, _ in VERDICTS], [{"answer": gold} for gold, _, _ in VERDICTS])
    assert judge(reward(), given) == [float(equal) for _, _, equal in VERDICTS]


def test_scores_and_the_bonus_for_a_box(reward: Callable[..., Math], rollouts: Rolled) -> None:
    given = rollouts(["5", r"\boxed{5}", r"\boxed{6}", "6"], [{"key": "5"}] * 4)
    options = {"answer_column": "key", "correct": 2.0, "wrong": -1.0, "format_weight": 0.25}
    assert judge(reward(**options), given) == [2.0, 2.25, -0.75, -1.0]
    assert judge(reward(**options, extract="boxed"), given) == [-1.0, 2.25, -0.75, -1.0]


def test_the_last_box_counts_and_equal_questions_are_asked_once(
    reward: Callable[..., Math], rollouts: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = reward()
    asked: list[Any] = []
    ask = mine._pool.ask
    monkeypatch.setattr(mine._pool, "ask", lambda questions: asked.extend(questions) or ask(questions))
    texts = [r"first \boxed{4} then \boxed{5}", r"another way to \boxed{5}", r"\boxed{5} or \boxed{4}"]
    assert judge(mine, rollouts(texts, [{"answer": "5"}] * 3)) == [1.0, 1.0, 0.0]
    assert [question["boxed"] for question in asked] == ["5", "4"]


# References


@pytest.mark.parametrize("gold", ["39", "1,234", r"\frac{1}{2}", "$x+1$", r"\{1, 2\}", "work #### 7", 3, 2.5])
def test_a_reference_that_can_be_read_is_accepted(reward: Callable[..., Math], gold: Any) -> None:
    reward().check(PromptRow("p", {"answer": gold}))


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("", "holds no answer that math-verify can read"),
        ("$$", "holds no answer that math-verify can read"),
        ("#### ", "holds no answer that math-verify can read"),
        (None, "must hold text or a number, not a NoneType"),
        (True, "must hold text or a number, not a bool"),
        (["5"], "must hold text or a number, not a list"),
    ],
)
def test_a_reference_that_can_not_is_refused(reward: Callable[..., Math], gold: Any, why: str) -> None:
    with pytest.raises(RowError, match=f"column 'answer' {why}"):
        reward().check(PromptRow("p", {"answer": gold}))


def test_refused_rows_are_counted_before_a_run(reward: Callable[..., Math]) -> None:
    golds = ["5", "$$", "6", "", None]
    rows = data.Rows(
        [(f"row {i}", PromptRow("p", {"answer": g})) for i, g in enumerate(golds)], data.Refusals(), ("f",)
    )
    check = _check_of_rewards([Source("mine", 1.0, reward())], {"answer": "mine"})
    left = rows.convert(check)
    assert [where for where, _ in left.items] == ["row 0", "row 2"]
    assert left.refused.lines() == [
        "2 x reward 'mine': column 'answer' holds no answer that math-verify can read (first: row 1)",
        "1 x reward 'mine': column 'answer' must hold text or a number, not a NoneType (first: row 4)",
    ]


# Processes


def test_a_comparison_that_never_ends_is_wrong_and_counted_and_harms_no_other(rollouts: Rolled) -> None:
    mine = make(seconds=0.5, workers=2)
    try:
        judge(mine, rollouts(["1"], [{"answer": "1"}]))  # the process is there
        begun = time.monotonic()
        texts = [rf"\boxed{{{ENDLESS}}}", "5", "6", r"\boxed{5}"]
        assert judge(mine, rollouts(texts, [{"answer": "5"}] * 4)) == [0.0, 1.0, 0.0, 1.0]
        assert time.monotonic() - begun < 30.0  # starting a process takes longer than the limit
        assert mine.context.metrics.sums["reward/mine/undecided"] == (1.0, 5.0)
    finally:
        mine.close()


def test_a_limit_by_the_processors_time_ends_the_process_by_the_system(pool: Pool) -> None:
    worker = pool._start()
    assert worker.ask({"gold": "3", "text": "", "boxed": ENDLESS, "seconds": 0.3}, 0.3) == Undecided()
    assert worker._process.returncode == -signal.SIGPROF and not worker.alive


def test_a_process_that_was_killed_is_replaced_and_asked_again(pool: Pool) -> None:
    question = {"gold": "1/2", "text": "0.5", "boxed": None}
    pool.ask([question])
    killed = [worker for worker in pool._alive if worker.alive]
    for worker in killed:
        os.kill(worker.pid, signal.SIGKILL)
        worker._process.wait()
    assert killed
    assert pool.ask([question] * 3) == [{"equal": True}] * 3


def test_where_no_verdict_can_be_had_the_response_has_failed(
    reward: Callable[..., Math], rollouts: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = reward()
    monkeypatch.setattr(mine._pool, "ask", lambda questions: [Lost("it was ended by SIGKILL")] * len(questions))
    assert judge(mine, rollouts(["5"], [{"answer": "5"}])) == [Failed("it was ended by SIGKILL")]


@pytest.mark.matrix
def test_a_worker_that_is_killed_twice_is_lost(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = pool._start

    def dead_on_arrival() -> Any:
        worker = start()
        worker._process.kill()
        return worker

    monkeypatch.setattr(pool, "_start", dead_on_arrival)
    for worker in list(pool._alive):
        worker.end()
    assert pool.ask([{"gold": "1", "text": "1", "boxed": None}]) == [
        Lost("the process that compares answers was ended by SIGKILL")
    ]


@pytest.mark.matrix
def test_no_process_is_left_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    """Not even one in the middle of a computation."""
    script = (
        "import sys, threading\n"
        "from rlhf_plugins.rewards.math.pool import Pool\n"
        "pool = Pool(1, 3.0)\n"
        "pool.ask([{'gold': '1', 'text': '1', 'boxed': None}])\n"
        "(worker,) = pool._alive\n"
        "print(worker.pid, flush=True)\n"
        f"pool.ask([{{'gold': '1', 'text': '', 'boxed': '{ENDLESS}'}}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdout.close()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


# In a plan


def test_a_plan_says_what_it_does(typed: Any, installed: Registry, machine: Machine) -> None:
    recipe = typed("--algo", "grpo", "--reward", "math", "--reward.math.seconds", "3")
    assert any("compared by math-verify in 2 processes" in note for note in compose(recipe, installed, machine).notes)


def test_without_math_verify_a_plan_says_what_to_install(
    typed: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "math_verify" else found(name, *a)
    )
    with pytest.raises(RequestError, match=r"needs the module 'math_verify': pip install 'rlhf-kit\[math\]'"):
        compose(typed("--algo", "grpo", "--reward", "math"), registries.load(), machine)
