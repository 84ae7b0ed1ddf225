"""The user's own function: how it is found, what it is given, and how its mistakes are told."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from rlhf.entries import RewardEntry
from rlhf.errors import RequestError, RunError
from rlhf.interfaces import Context, Failed
from rlhf.plan import Component
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards import PythonConfig, function_is_there
from rlhf_plugins.rewards.python import PythonFunction

CHAT = ({"role": "user", "content": "hi"},)


@pytest.fixture
def make(tmp_path: Path, context: Context) -> Callable[..., PythonFunction]:
    def reward(source: str, name: str = "f", batched: bool | None = None) -> PythonFunction:
        file = tmp_path / "mine.py"
        file.write_text(textwrap.dedent(source))
        return PythonFunction(PythonConfig(path=f"{file}:{name}", batched=batched), context)

    return reward


def judge(reward: PythonFunction, rollouts: Rollouts) -> list[Any]:
    return list(reward.judge(rollouts, None))  # type: ignore[arg-type]


Make = Callable[..., PythonFunction]
Rolled = Callable[..., Rollouts]

FORMS = [
    # function, batched, what is returned for two samples
    ("def f(prompt, completion): return (prompt, completion)", None, [("q", "a"), ([*CHAT], "b")]),
    ("def f(completion): return completion", None, ["a", "b"]),
    ("def f(completion, answer): return completion + answer", None, ["a1", "b2"]),
    ("def f(completion, *, answer, level=0): return (answer, level)", None, [("1", 0), ("2", 5)]),
    ("def f(completion, **columns): return columns", None, None),
    ("def f(prompts, completions): return list(zip(prompts, completions))", None, [("q", "a"), ([*CHAT], "b")]),
    ("def f(completions, answer): return [c + a for c, a in zip(completions, answer)]", None, ["a1", "b2"]),
    ("def f(completions, level=None): return level", None, [None, 5]),
    ("def f(**all): return all['completions']", True, ["a", "b"]),
    ("def f(**all): return all['completion']", False, ["a", "b"]),
    ("import numpy\ndef f(completions): return numpy.array([0.5, 1.5])", None, [0.5, 1.5]),
    ("class F:\n    def __call__(self, completion): return completion\nf = F()", None, ["a", "b"]),
]


def test_a_file_that_has_changed_since_is_noted(make: Make, context: Context) -> None:
    said: list[str] = []
    first = make("def f(completion): return 1.0")
    kept = first.state()
    for source, noted in (("def f(completion): return 1.0", 0), ("def f(completion): return -1.0", 1)):
        again = make(source)
        again.context = attrs.evolve(context, say=said.append)
        again.load_state(kept)
        assert len(said) == noted
    assert "mine.py:f: the file has changed since" in said[0]
    again.load_state({})  # of a run from before this was kept


def test_a_function_that_ends_the_process_is_told_as_any_error(make: Make, rollouts: Rolled) -> None:
    with pytest.raises(RunError, match=r"raised SystemExit: 3, on"):
        judge(make("def f(completion): raise SystemExit(3)"), rollouts(["a"], [{}], ["q"]))


@pytest.mark.parametrize(("source", "batched", "returned"), FORMS)
def test_forms(make: Make, rollouts: Rolled, source: str, batched: bool | None, returned: list[Any] | None) -> None:
    given = rollouts(["a", "b"], [{"answer": "1"}, {"answer": "2", "level": 5}], ["q", CHAT])
    if returned is None:
        returned = [{"prompt": "q", "answer": "1"}, {"prompt": [*CHAT], "answer": "2", "level": 5}]
    assert judge(make(source, batched=batched), given) == returned


def test_called_once_a_batch(make: Make, rollouts: Rolled) -> None:
    reward = make("calls = []\ndef f(completions):\n    calls.append(completions)\n    return [float(len(calls))] * 3")
    assert judge(reward, rollouts(["a", "b", "c"])) == [1.0, 1.0, 1.0]


def test_failed_is_handed_on(make: Make, rollouts: Rolled) -> None:
    reward = make("from rlhf.api import Failed\ndef f(completion): return Failed('time')")
    assert judge(reward, rollouts(["a"])) == [Failed("time")]


def test_neighbours_dataclasses_and_one_module_a_file(tmp_path: Path, context: Context, rollouts: Rolled) -> None:
    (tmp_path / "grading_by_hand.py").write_text("def points(text): return float(len(text))")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom grading_by_hand import points\n"
        "@dataclass\nclass Seen:\n    count: int = 0\nseen = Seen()\n"
        "def f(completion):\n    seen.count += 1\n    return points(completion)\n"
        "def g(completion):\n    import grading_by_hand\n    return seen.count\n"
    )
    f, g = (PythonFunction(PythonConfig(path=f"{tmp_path}/mine.py:{name}"), context) for name in "fg")
    assert judge(f, rollouts(["abc", "abcde"])) == [3.0, 5.0]
    assert judge(g, rollouts(["a"])) == [2]


def test_function_of_a_module(
    tmp_path: Path, context: Context, rollouts: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judging_by_hand").mkdir()
    (tmp_path / "judging_by_hand" / "inner.py").write_text("def f(completion): return 4.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert judge(PythonFunction(PythonConfig(path="judging_by_hand.inner:f"), context), rollouts(["a"])) == [4.0]
    with pytest.raises(RequestError, match=r"raised ModuleNotFoundError: No module named .judging_by_hand\.outer"):
        PythonFunction(PythonConfig(path="judging_by_hand.outer:f"), context)


REFUSED = [
    ("x = 1", "f", "'f' is not there"),
    ("def good(completion): ...\nf = 3", "f", "'f' is not a function, but 3\n    .* has good"),
    (
        "def f(text): ...",
        "f",
        r"takes \(text\), and no 'completion' to judge\n    name its parameters prompt, completion",
    ),
    ("def f(prompt): ...", "f", "no 'completion' to judge"),
    ("def f(completion, /): ...", "f", "can't be given by name"),
    ("async def f(completion): ...", "f", "asynchronous"),
    ("import nothing_of_the_kind", "f", "raised ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
    ("open('/nothing/of/the/kind')", "f", "raised FileNotFoundError"),
    ("def f(", "f", "raised SyntaxError"),
]


@pytest.mark.parametrize(("source", "name", "says"), REFUSED)
def test_refused_before_the_run(make: Make, source: str, name: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make(source, name)


def test_batched_that_takes_no_lists(make: Make) -> None:
    with pytest.raises(RequestError, match="no 'completions' to judge"):
        make("def f(completion): ...", batched=True)


FAILS = [
    (
        "def f(completion): return 1 / (completion != 'b')",
        r"ZeroDivisionError: .*, on sample 1 \(prompt '<s>question 1'\)",
    ),
    ("def f(completions): raise ValueError('no')", r"ValueError: no, on a batch that begins with sample 0 \(prompt"),
    ("def f(completion, target): ...", r"needs 'target', which sample 0 \(.*\) has not; its columns: answer"),
    ("def f(completion, answer, level): ...", r"needs 'level', which sample 0"),
    ("def f(completions): return [1.0]", "returned 1 numbers for a batch of 2"),
    ("def f(completions): return 'ab'", "returned 'ab' for a batch, not a list of 2 numbers"),
    ("def f(completions): return {'a': 1, 'b': 2}", "not a list of 2 numbers"),
    ("def f(completions): return 1.0", "returned 1.0 for a batch"),
    ("def f(completions): return None", "returned None for a batch"),
]


@pytest.mark.parametrize(("source", "says"), FAILS)
def test_failing_in_the_run(make: Make, rollouts: Rolled, source: str, says: str) -> None:
    given = rollouts(["a", "b"], [{"answer": "1"}, {"answer": "2", "level": 5}])
    with pytest.raises(RunError, match=says) as error:
        judge(make(source), given)
    assert "reward 'mine' (" in str(error.value) and "mine.py:f)" in str(error.value)


def test_planning_looks_but_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")

    def problems(path: str) -> list[str]:
        entry = RewardEntry(name="python", summary="", impl="m:C", config=PythonConfig)
        return [str(p) for p in function_is_there(None, Component(entry, PythonConfig(path=path)))]  # type: ignore[arg-type]

    assert problems(f"{tmp_path}/mine.py:f") == []
    assert problems("json.decoder:f") == []  # only the package is looked for
    assert "there is no such file" in problems(f"{tmp_path}/other.py:f")[0]
    for path in ("mine.py", "mine.py:", ":f", "mine.py:f()"):
        assert "is not FILE.py:FUNCTION" in problems(path)[0], path
    assert "no module 'nothing_of_the_kind' is installed" in problems("nothing_of_the_kind:f")[0]
    assert "neither a .py file nor a module's name" in problems("folder/mine:f")[0]
