"""A command that trains starts itself once more with the allocator's tunables; nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from rlhf import allocator


class RestartedError(Exception):
    """In place of another process."""


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started; Linux without a GPU, whatever the tests run on."""
    found: list[Any] = []

    def fake_execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        found.append((path, words, environment))
        raise RestartedError

    monkeypatch.setattr(os, "execve", fake_execve)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rlhf", "run", "--algo", "ppo"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return found


@pytest.mark.parametrize("command", ["run", "pipeline", "eval"])
def test_what_trains_restarts_with_the_words_it_was_started_with(restarts: list[Any], command: str) -> None:
    with pytest.raises(RestartedError):
        allocator.restart_with_tunables([command, "--algo", "ppo"])
    ((path, words, environment),) = restarts
    assert path == words[0] == sys.executable
    assert words[1:] == ["-m", "rlhf", "run", "--algo", "ppo"]
    assert environment["GLIBC_TUNABLES"] == allocator.TUNABLES
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("words", [[], ["plan"], ["plugins"], ["report", "runs/x"], ["run", "--help"], ["-h"]])
def test_what_trains_nothing_does_not(restarts: list[Any], words: list[str]) -> None:
    allocator.restart_with_tunables(words)
    assert not restarts


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "LD_PRELOAD"])
def test_the_users_own_choice_stays(restarts: list[Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "" if name == "GLIBC_TUNABLES" else "libjemalloc.so")
    allocator.restart_with_tunables(["run"])
    assert not restarts


def test_beside_a_gpu_memory_goes_back(restarts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    allocator.restart_with_tunables(["run"])
    assert not restarts


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_free_pages_inside_the_heap_are_given_back() -> None:
    """In a process of its own, with the tunables of a run: 64 blocks of 4 MiB, all freed but the last."""
    code = (
        "import ctypes, psutil\n"
        "from rlhf import allocator\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "blocks = [libc.malloc(4 << 20) for _ in range(64)]\n"
        "[ctypes.memset(block, 1, 4 << 20) for block in blocks]\n"
        "held = psutil.Process().memory_info().rss\n"
        "[libc.free(block) for block in blocks[:-1]]\n"
        "kept = psutil.Process().memory_info().rss\n"
        "allocator.give_back()\n"
        "print(held - kept >> 20, kept - psutil.Process().memory_info().rss >> 20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GLIBC_TUNABLES": allocator.TUNABLES}, capture_output=True,
        text=True,
    )  # fmt: skip
    kept, given = map(int, done.stdout.split())
    # 252 MiB were freed; huge pages at the ends, of 2 MiB each, may stay
    assert kept < 8 and given > 240, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's tunables are Linux's")
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="beside a GPU nothing is restarted")
def test_a_real_command_has_them_and_fails_as_it_would() -> None:
    code = (
        "import os, sys; from rlhf import cli; sys.orig_argv = [sys.executable, '-c', "
        "\"import os, sys; print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])\", 'run', 'x']; "
        "sys.argv = ['rlhf', 'run', 'x']; cli.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{allocator.TUNABLES} ['run', 'x']\n", done.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "rlhf", "run", "--algo", "nope"], env=environment, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "nope" in wrong.stderr
