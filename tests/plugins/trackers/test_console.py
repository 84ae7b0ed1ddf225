"""What the console says, to a pipe and to a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import attrs
import pytest
import torch

from rlhf.entries import (
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    LauncherEntry,
    OptimizerEntry,
    PolicyEntry,
    Role,
)
from rlhf.errors import RunError
from rlhf.facts import Machine, ModelFacts
from rlhf.interfaces import Context
from rlhf.plan import Component, Plan, RolePlan
from rlhf.recipe import RunOptions
from rlhf.sequences import Rollouts, Sequences
from rlhf_plugins.trackers import ConsoleConfig, console

ESCAPE = "\x1b[2J\x1b[1A\r\a"


def make_plan(**changes: Any) -> Plan:
    def component(entry: Any) -> Component:
        return Component(entry(name="some", summary="one of its kind", impl="a:B"))

    algo = AlgorithmEntry(name="tempered", summary="weighs by reward", impl="a:B", requires=frozenset({"rollouts"}))
    policy = RolePlan(Role("policy", trainable=True), ModelFacts("org/small"), (), "policy")
    plan = Plan(
        algo=Component(algo),
        policy=component(PolicyEntry),
        engine=component(EngineEntry),
        rewards=(),
        optim=component(OptimizerEntry),
        backend=component(BackendEntry),
        launch=component(LauncherEntry),
        trackers=(),
        roles=(policy, attrs.evolve(policy, role=Role("reference"))),
        data=(),
        eval_data=(),
        run=RunOptions(batch_size=16),
        machine=Machine(2, frozenset(), 10**9, (), 1),
    )
    return attrs.evolve(plan, **changes)


def make_rollouts(prompts: list[str], texts: list[str], rewards: list[float]) -> Rollouts:
    tokens = torch.tensor([1])
    n = len(texts)
    stop: Literal["stop"] = "stop"
    return Rollouts(
        sequences=Sequences.of([tokens] * n, [tokens] * n),
        logp=None,
        finish=(stop,) * n,
        rows=(None,) * n,
        prompts=tuple(prompts),
        texts=tuple(texts),
        tags=("",) * n,
        rewards=torch.tensor(rewards),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Seconds that pass only when the test says so."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def started(folder: Path, steps: int, first_step: int = 0, **options: Any) -> console.Console:
    tracker = console.Console(ConsoleConfig(**options), Context(plan=make_plan()))
    notes = ["--engine some: taken because none was named"]
    run = {"directory": str(folder), "plan": tracker.context.plan, "steps": steps, "notes": notes}
    tracker.run_started({**run, "first_step": first_step})
    return tracker


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""  # stdout is for results
    assert not {"\r", "\x1b"} & set(err)
    return err.splitlines()


SUMMARY = {
    "status": "done",
    "steps": 4,
    "wall_seconds": 3725.4,
    "peak_rss_bytes": 2_500_000_000,
    "peak_device_bytes": 0,
    "heldout_before": {"reward/mean": 0.25, "loss": 2.0},
    "heldout_after": {"reward/mean": 0.75},
}


def test_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(tmp_path / "run", 200)
    assert said(capsys) == [
        "rlhf tempered: weighs by reward",
        "  model    org/small",
        f"  results  {tmp_path}/run",
        "  device   cpu, 2 cores",
        "  length   200 steps, 16 prompts each",
        "  note     --engine some: taken because none was named",
    ]


def test_models_of_several_roles_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    other = attrs.evolve(plan.roles[1], role=Role("reward"), model=ModelFacts("org/judge"))
    tracker = console.Console(ConsoleConfig(), Context(plan=plan))
    roles = attrs.evolve(plan, roles=(*plan.roles, other), engine=None)
    tracker.run_started({"directory": str(tmp_path), "plan": roles, "steps": 1, "first_step": 0, "notes": []})
    assert "  model    org/small (policy, reference); org/judge (reward)" in said(capsys)


def test_a_step_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    tracker = started(tmp_path, 4)
    clock.now += 100
    tracker.evaluated(0, {"reward/mean": 0.25})  # takes 100 s, which say nothing of a step
    said(capsys)
    metrics = {
        "loss": 0.123456,
        "reward/mean": 0.5,
        "kl/k1": float("nan"),
        "response/length": 42.0,
        "optim/learning_rate": 1e-6,
        "perf/tokens_per_second": 12345.6,
        "perf/floor_ratio": 3.21,
        "policy/entropy": 1.0,
    }
    clock.now += 60
    tracker.step_finished(1, metrics)
    clock.now += 120
    tracker.step_finished(2, {"loss": 0.1})
    # 160 s since the start, then 60 s a step for 3 steps; after 120 more the mean is 90 s, for 2 steps.
    assert said(capsys) == [
        "step 1/4, 0:02:40, 0:03:00 left | loss 0.1235 | reward 0.5 | kl nan | length 42 | lr 1e-06 | 12346 tok/s"
        " | 3.21x floor",
        "step 2/4, 0:04:40, 0:03:00 left | loss 0.1",
    ]


@pytest.mark.parametrize(("steps", "lines"), [(5, 5), (20, 20), (1000, 21)])
def test_about_twenty_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: SimpleNamespace, steps: int, lines: int
) -> None:
    tracker = started(tmp_path, steps)
    said(capsys)
    for step in range(1, steps + 1):
        tracker.step_finished(step, {"loss": 1.0})
    found = [int(re.findall(r"step (\d+)/", line)[0]) for line in said(capsys)]
    assert len(found) == lines  # 21: the first step besides, as a sign of life
    assert found[0] == 1 and found[-1] == steps
    if steps == 1000:
        assert found[1:] == list(range(50, 1001, 50))


def test_a_slow_run_is_not_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    tracker = started(tmp_path, 1000, every=60.0)
    said(capsys)
    for step in range(1, 11):
        clock.now += 25
        tracker.step_finished(step, {"loss": 1.0})
    # 25 s a step: step 1, then the third step after each line (75 s).
    assert [line.split("/")[0] for line in said(capsys)] == ["step 1", "step 4", "step 7", "step 10"]


def test_a_resumed_run_counts_its_own_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    tracker = started(tmp_path, 10, first_step=6)
    clock.now += 10
    tracker.step_finished(7, {"loss": 1.0})
    lines = said(capsys)
    assert "  length   10 steps, 16 prompts each, going on after step 6" in lines
    assert lines[-1] == "step 7/10, 0:00:10, 0:00:30 left, saved at 6 | loss 1"


def test_held_out_results_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path, 4)
    said(capsys)
    tracker.evaluated(2, {"reward/mean": 0.5, "loss": 1.25})
    tracker.checkpoint_saved(2, tmp_path / "checkpoints" / "step-000002")
    tracker.evaluated(4, {"reward/mean": 0.75})  # the table has it
    assert said(capsys) == ["held-out at step 2: reward/mean 0.5 | loss 1.25"]
    tracker.step_finished(4, {})
    assert ", saved at 2 | " in said(capsys)[-1]


def test_samples_of_the_first_and_the_last_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path, 4, samples=2)
    said(capsys)
    # Two responses to a, then b, c: one of each of the first two prompts is shown.
    for step in range(1, 5):
        prompts = ["a", "a", "b", "c"]
        tracker.rollout_finished(step, make_rollouts(prompts, [f"{step}.{i}" for i in range(4)], [0, 1, 0.5, 2]))
        tracker.step_finished(step, {})
    tracker.run_finished(SUMMARY, None)
    lines = said(capsys)
    first, last = lines.index("samples of step 1"), lines.index("samples of step 4")
    assert lines[first + 1 : first + 5] == [
        "  prompt    a",
        "  response  1.0  [reward 0, stop]",
        "  prompt    b",
        "  response  1.2  [reward 0.5, stop]",
    ]
    assert lines[last + 2] == "  response  4.0  [reward 0, stop]"
    assert sum("samples of" in line for line in lines) == 2


def test_a_single_rollout_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path, 1)
    tracker.rollout_finished(1, make_rollouts([], [], []))  # all failed to be judged
    tracker.rollout_finished(1, make_rollouts(["a"], ["b"], [1.0]))
    tracker.run_finished(SUMMARY, None)
    assert sum("samples of" in line for line in said(capsys)) == 1


def test_no_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path, 1, samples=0)
    tracker.rollout_finished(1, make_rollouts(["a"], ["b"], [1.0]))
    tracker.run_finished(SUMMARY, None)
    assert not any("samples of" in line for line in said(capsys))


def test_text_of_a_model_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path / f"r{ESCAPE}", 4)
    tracker.rollout_finished(1, make_rollouts([f"[bold]p{ESCAPE}"], [f"r\n{ESCAPE} :smile: \u202e"], [1.0]))
    tracker.evaluated(1, {f"m{ESCAPE}": 1.0})
    tracker.run_finished({**SUMMARY, "heldout_before": {f"m{ESCAPE}": 1.0}}, None)
    text = "\n".join(said(capsys))  # which finds no escape and no carriage return
    assert not {"\a", "\u202e"} & set(text)
    assert "[bold]p" in text and ":smile:" in text  # markup is text


def test_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = started(tmp_path / "a run", 4)
    (tmp_path / "a run" / "model").mkdir(parents=True)
    said(capsys)
    tracker.run_finished(SUMMARY, None)
    assert said(capsys) == [
        "",
        "held-out         before         after",
        "reward/mean        0.25 ->       0.75",
        "loss                  2 ->          -",
        "",
        "done: 4 steps in 1:02:05; peak memory 2.50 GB",
        f"model  {tmp_path}/a run/model",
        f"next   rlhf report '{tmp_path}/a run'",
    ]


def test_the_end_of_a_run_that_failed_names_no_model_but_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = started(tmp_path, 4)
    (tmp_path / "model").mkdir()  # of an earlier, shorter run of this folder
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    said(capsys)
    tracker.run_finished({**SUMMARY, "status": "failed", "heldout_before": {}, "heldout_after": {}}, RunError("no"))
    assert said(capsys)[1:] == [
        "failed: 4 steps in 1:02:05; peak memory 2.50 GB",
        f"resume rlhf run --output {tmp_path} --resume",
        f"next   rlhf report {tmp_path}",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(tracker: console.Console) -> None:
    tracker.step_finished(1, {"loss": 0.5})
    print("a result")
    print("a warning", file=sys.stderr)
    tracker.run_finished(SUMMARY, None)


def test_a_terminal_gets_a_bar_and_stdout_stays_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    drive(started(tmp_path, 4))
    shown = terminal.getvalue()
    assert "step 1/4" in shown and "━" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again
    assert "a warning" in shown
    assert sys.stderr is terminal
    assert capsys.readouterr().out == "a result\n"


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {}])
def test_a_pipe_gets_no_bar_whatever_the_environment_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    drive(started(tmp_path, 4))
    out, err = capfd.readouterr()
    assert out == "a result\n"
    assert "━" not in err and "\r" not in err
    assert re.findall("\x1b[^m]*?[A-Za-z]", err) == re.findall(r"\x1b\[[\d;]*m", err)  # colours at most
    assert "step 1/4" in err


def test_a_dumb_terminal_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    drive(started(tmp_path, 4))
    assert "\x1b" not in terminal.getvalue() and "\r" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.123456, "0.1235"), (1.41e-5, "1.41e-05"), (123456.7, "123457"), (float("inf"), "inf"), (2.0, "2")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert console.number(value) == text


def test_shortening_keeps_the_end_of_a_prompt_and_the_start_of_a_response() -> None:
    assert console.shorten("  a \n b\t") == "a b"
    assert console.shorten("abcdefgh", 6) == "abc..."
    assert console.shorten("abcdefgh", 6, keep_end=True) == "...fgh"
    assert console.shorten("abcdef", 6) == "abcdef"
