"""Requests to stop: at once before the first step, after the step at work later, and what is told of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf import cli, signals

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_raised_at_once_and_the_handler_is_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name), signals.raised() as asked:
        send(number)
    assert asked.number == number and signal.getsignal(number) is before


def test_sigterm_again_does_not_disturb_what_is_cleaned_up() -> None:
    with signals.raised():
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):  # a person who is out of patience
            send(signal.SIGINT)


def test_noted_and_only_a_second_ctrl_c_raises() -> None:
    told: list[int] = []
    with signals.noted(told.append):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert told == [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP]


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main(list(words))
    return int(done.value.code or 0)


@pytest.mark.parametrize("number", STOPPING)
@pytest.mark.parametrize("place", ["rlhf.assemble.assemble", "rlhf.cli.plan.compose", "rlhf.loop.Loop._evaluate"])
def test_a_run_stopped_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, place: str
) -> None:
    import rlhf.assemble
    import rlhf.loop  # noqa: F401 - so that `place` is found

    monkeypatch.setattr(place, lambda *arguments: send(number))
    out = tmp_path / "out"
    assert run("run", "--algo", "sft", "--max-steps", "1", "--output", str(out)) == 130
    said = capsys.readouterr().err
    assert said.endswith("interrupted before the first step; no checkpoint was written\n")
    assert "Traceback" not in said
    assert out.exists() is (place == "rlhf.loop.Loop._evaluate")  # before, nothing is written at all
    if out.exists():
        from rlhf.rundir import RunDirectory

        summary = RunDirectory(out).summary()
        assert summary is not None and (summary["status"], summary["steps"]) == ("interrupted", 0)


def test_ctrl_c_twice_in_a_step_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf.loop import Loop
    from rlhf.rundir import RunDirectory

    learn = Loop._learn

    def twice(loop: Loop, experience: Any) -> Any:
        if loop.step == 2:
            send(signal.SIGINT)
            send(signal.SIGINT)
        return learn(loop, experience)

    monkeypatch.setattr(Loop, "_learn", twice)
    words = ("run", "--algo", "sft", "--max-steps", "4", "--eval-rows", "0", "--batch-size", "2", "--save-every", "2")
    assert run(*words, "--output", str(tmp_path / "out")) == 130
    said = capsys.readouterr().err
    assert f"interrupted; step-000002 stands: rlhf run --resume --output {tmp_path}/out" in said
    summary = RunDirectory(tmp_path / "out").summary()
    assert summary is not None and (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert run(*words[:-1], "3", "--output", str(tmp_path / "early")) == 130
    assert "interrupted before the first checkpoint; no checkpoint was written" in capsys.readouterr().err


def test_what_a_library_makes_of_an_interruption_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def clumsy(*arguments: Any) -> None:
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("a module could not be initialised") from None

    monkeypatch.setattr("rlhf.cli.plan.compose", clumsy)
    assert run("plan", "--algo", "sft") == 130
    assert capsys.readouterr().err == "interrupted\n"
