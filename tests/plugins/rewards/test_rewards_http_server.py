"""The reference reward server: as a process, and what it makes of functions and of requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.interfaces import Context, Failed
from rlhf.sequences import Rollouts
from rlhf_plugins.rewards.http.entry import HTTPConfig
from rlhf_plugins.rewards.http.reward import HTTPReward
from rlhf_plugins.rewards.http_server import Function, RewardServer, main


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    made: list[RewardServer] = []

    def make(function: Any, token: str = "") -> str:
        made.append(RewardServer("127.0.0.1", 0, Function(function), token))
        threading.Thread(target=made[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{made[-1].server_port}"

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def items(*texts: str, **columns: Any) -> bytes:
    asked = [{"prompt": f"p{i}", "completion": text, "columns": columns} for i, text in enumerate(texts)]
    return json.dumps({"version": 1, "items": asked}).encode()


def fussy(completion: str) -> float:
    if completion == "b":
        raise KeyError("missing")
    return float("nan") if completion == "c" else 1.0


FUNCTIONS: list[tuple[Any, dict[str, Any], list[Any]]] = [
    (lambda completion: len(completion), {}, [1.0, 1.0]),
    (lambda prompt, completion: prompt == "p1", {}, [0.0, 1.0]),
    (lambda completion, answer, extra=3: answer + extra, {"answer": 1}, [4.0, 4.0]),
    (lambda completion, **columns: sum(columns[key] for key in ("a", "b")), {"a": 1, "b": 2}, [3.0, 3.0]),
    (lambda prompts, completions, a: [len(prompts), a[1]], {"a": 7}, [2.0, 7.0]),
    (lambda completion: {"score": 0.5, "parts": {"x": 1}}, {}, [{"score": 0.5, "parts": {"x": 1.0}}] * 2),
    (lambda completion: Failed("no idea"), {}, [{"error": "no idea"}] * 2),
    (lambda completion: "1", {}, [{"error": "TypeError: the function returned '1', not a number"}] * 2),
    (lambda completions: [1.0], {}, [{"error": "ValueError: 1 scores for 2 completions"}] * 2),
    (
        lambda completion, answer: 1.0,
        {},
        [{"error": "TypeError: no answer was sent: --reward.http.columns answer"}] * 2,
    ),
    (fussy, {}, [1.0, {"error": "KeyError: 'missing'"}]),
]


@pytest.mark.parametrize(("function", "columns", "scores"), FUNCTIONS)
def test_functions(serve: Callable[..., str], function: Any, columns: dict[str, Any], scores: list[Any]) -> None:
    assert post(serve(function), items("a", "b", **columns)) == (200, {"scores": scores})


def test_nothing_asked_is_nothing_answered(serve: Callable[..., str]) -> None:
    assert post(serve(fussy), items()) == (200, {"scores": []})


WRONG = [
    (b"no json", 400),
    (b"[]", 400),
    (json.dumps({"version": 2, "items": []}).encode(), 400),
    (json.dumps({"version": 1, "items": [{"completion": "a", "columns": {}}]}).encode(), 400),
    (json.dumps({"version": 1, "items": [{"prompt": "p", "completion": 3, "columns": {}}]}).encode(), 400),
    (json.dumps({"version": 1, "items": [{"prompt": "p", "completion": "a"}]}).encode(), 400),
    (b"[" * 100_000, 400),
]


@pytest.mark.parametrize(("body", "status"), WRONG)
def test_what_is_no_request_is_refused(serve: Callable[..., str], body: bytes, status: int) -> None:
    assert post(serve(fussy), body)[0] == status


def test_who_has_not_the_token_learns_nothing(serve: Callable[..., str]) -> None:
    url = serve(fussy, "right-right-right-right")
    assert post(url, items("a"))[0] == 401
    assert post(url, items("a"), Authorization="Bearer wrong")[0] == 401
    assert post(url, items("a"), Authorization="Bearer right-right-right-right") == (200, {"scores": [1.0]})


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    made: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "rlhf_plugins.rewards.http_server", *words, "--port", "0"]
        made.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        said = made[-1].stderr
        assert said is not None
        return made[-1], next(line.split()[-1] for line in said if line.startswith("listening at"))

    yield start
    for process in made:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_as_a_process_with_a_token_for_a_reward(
    tmp_path: Path, started: Any, rollouts: Callable[..., Rollouts], context: Context
) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\ndef score(completion, answer):\n"
        "    if 'torch' in sys.modules: raise RuntimeError('torch is there')\n"
        "    if completion == 'odd': raise ValueError('odd')\n"
        "    return float(completion == answer)\n"
    )
    process, url = started("mine.py:score", "--token-file", "token")
    assert os.stat(tmp_path / "token").st_mode & 0o777 == 0o600
    config = HTTPConfig(url=url, columns=("answer",), token_file=str(tmp_path / "token"), batch_size=2)
    given = rollouts(["4", "5", "odd"], [{"answer": "4"}] * 3)
    found = HTTPReward(config, context).judge(given, None)  # type: ignore[arg-type]
    assert found == [1.0, 0.0, Failed("ValueError: odd")]
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0


def test_what_can_not_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def f(a, /): ...")
    assert main([f"{tmp_path}/nosuch.py:f"]) == 2
    assert main([f"{tmp_path}/mine.py:g"]) == 2
    assert main([f"{tmp_path}/mine.py:f"]) == 2
    said = capsys.readouterr().err
    assert "there is no such file" in said and "'g' is not there" in said and "can't be given by name" in said
    for words in (["mine.py"], ["mine.py:f", "--host", "0.0.0.0"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "whoever reaches it could use it; add --token-file FILE" in capsys.readouterr().err
