"""The local launcher, with fake ranks: small programs that do what ranks do, well or badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import attrs
import psutil
import pytest

from rlhf.api import Context, Interrupted, Launcher, Problem, Report, RequestError, RunError
from rlhf_plugins.launchers import local

FAKE_RANK = """
import json, os, signal, sys, threading, time
rank = int(os.environ["RANK"])
def report(code, **what):
    with open(os.environ["RLHF_REPORT"], "w") as file:
        json.dump({"code": code, **what}, file)
    os._exit(code)
"""


def launcher(count: int) -> Launcher:
    plan = cast(Any, attrs.make_class("Plan", ["run", "machine"])(
        attrs.make_class("Run", ["nproc"])(count), attrs.make_class("Machine", ["cpus"])(4)
    ))  # fmt: skip
    return local.Local(None, Context(plan=plan))


def launch(body: str, count: int = 2) -> int:
    return launcher(count).launch(lambda: 7, [sys.executable, "-c", FAKE_RANK + body])


def test_a_single_one_stays_in_this_process() -> None:
    assert launch("report(1, message='not to be started')", count=1) == 7


def test_each_rank_is_told_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = f"""
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
with open({str(tmp_path)!r} + "/" + str(rank), "w") as file:
    json.dump([os.environ[name] for name in names], file)
"""
    assert launch(body) == 0
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first[:-1] == ["0", "0", "2", "2", "127.0.0.1", "2"] and second[:-1] == [
        "1",
        "1",
        "2",
        "2",
        "127.0.0.1",
        "2",
    ]
    assert first[-1] == second[-1] and int(first[-1]) > 1023


def test_a_rank_that_fails_is_named_and_the_one_that_lost_it_is_not() -> None:
    body = "report(1, message='a NaN') if rank else (time.sleep(0.2), report(1, message='lost contact', lost=True))"
    with pytest.raises(RunError, match=r"^rank 1: a NaN$"):
        launch(body)


def test_a_killed_rank_is_told_with_its_signal_and_last_words() -> None:
    body = """
print("some words", flush=True)
if rank:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
report(1, message="lost contact", lost=True)
"""
    with pytest.raises(RunError) as caught:
        launch(body)
    text = str(caught.value)
    assert text.startswith("rank 1 of 2 was ended by signal 9 (SIGKILL)") and text.endswith("some words")


def test_one_that_hangs_after_another_failed_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE", 0.3)
    start = time.monotonic()
    with pytest.raises(RunError, match="rank 1 of 2 was ended by exit code 3"):
        launch("os._exit(3) if rank else time.sleep(60)")
    assert time.monotonic() - start < 20


def test_one_that_takes_longer_than_another_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_GRACE", 0.1)
    assert launch("time.sleep(0.6 if rank == 0 else 0)") == 0


def test_a_wrong_request_is_raised_as_it_was() -> None:
    with pytest.raises(RequestError) as caught:
        launch("report(2, problems=[{'what': 'no such file', 'fix': 'another'}])")
    assert caught.value.problems == [Problem("no such file", "another")]


def test_only_rank_0_prints(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("print('from', rank); print('error of', rank, file=sys.stderr)") == 0
    out, err = capfd.readouterr()
    assert out == "from 0\n" and err == "error of 0\n"


PARENT = """
import sys
from test_launchers_local import launch
from rlhf.errors import Interrupted
try:
    launch(sys.argv[1])
except Interrupted as error:
    print(error)
    sys.exit(130)
"""


def parent(body: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own, to be sent signals."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, body], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def ready(folder: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    return psutil.Process(process.pid).children()


def at_work(folder: Path, then: str) -> str:
    return f"signal.signal(signal.SIGINT, lambda *a: {then})\nopen({str(folder)!r} + f'/{{rank}}', 'w')\ntime.sleep(60)"


def test_an_interrupt_is_handed_to_every_rank(tmp_path: Path) -> None:
    process = parent(at_work(tmp_path, "report(130, message='stopped after step 3')"))
    ready(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and out == "stopped after step 3\n"


def test_a_second_interrupt_ends_ranks_that_do_not_hear_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = parent(at_work(tmp_path, "None"))
    children = ready(tmp_path, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped at once by SIGINT" in out
    assert not psutil.wait_procs(children, 5)[1]


def test_a_report_comes_back_as_what_it_was() -> None:
    assert isinstance(Report.of(Interrupted("x")).error(1), Interrupted)
    assert str(Report.of(RunError("broke")).error(2)) == "rank 2: broke"
    problems = [Problem("a", "b"), Problem("c")]
    again = Report(**json.loads(json.dumps(attrs.asdict(Report.of(RequestError(problems)))))).error(0)
    assert isinstance(again, RequestError) and again.problems == problems
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        assert "ZeroDivisionError: by zero" in str(Report.of(error).error(1))
