"""Processes that compare answers, each for one thread of this one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs

from rlhf.api import RunError
from rlhf_plugins.engines.asking import every

_START_SECONDS = 120.0
_WALL = 10.0
"""Seconds of the clock for one of a processor, and as many more: when a machine is this busy, no verdict is had."""
_LAST_WORDS = 2000


@attrs.frozen
class Undecided:
    """The comparison took more than its seconds of a processor: whoever asks again gets the same."""


@attrs.frozen
class Lost:
    """No verdict, for a reason that isn't the answer's: it might be had another time."""

    why: str


Verdict = dict[str, bool] | Undecided | Lost


class Pool:
    """So many workers, started when they are first needed."""

    def __init__(self, count: int, seconds: float) -> None:
        """
        Args:
            seconds: of a processor, for one question.
        """
        self._count = count
        self._seconds = seconds
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self._over = threading.Event()
        """Whoever asked is gone: no worker is started again."""
        for _ in range(count):
            self._free.put(None)
        self._closer = weakref.finalize(self, _end_all, self._alive)

    def ask(self, questions: Sequence[dict[str, Any]]) -> list[Verdict]:
        """A verdict each, in order.

        Raises:
            RunError: no worker can be started.
        """
        try:
            return every([partial(self._one, question) for question in questions], self._count, self._over)
        except BaseException:
            self.close()  # those under way end at once
            raise

    def close(self) -> None:
        """End the workers."""
        _end_all(self._alive)

    def _one(self, question: dict[str, Any]) -> Verdict:
        worker = self._free.get()
        try:
            for _ in range(2):  # one that the system ended is no reason to have no verdict
                if self._over.is_set():
                    return Lost("stopped")
                if worker is None or not worker.alive:
                    worker = self._start()
                verdict = worker.ask({**question, "seconds": self._seconds}, self._seconds)
                if not isinstance(verdict, Lost):
                    break
            return verdict
        finally:
            self._free.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            self._alive.difference_update([one for one in self._alive if not one.alive])
            self._alive.add(worker)
        worker.wait_until_ready()
        return worker


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_plugins.rewards.math.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C is this process's business
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """
        Raises:
            RunError: it ended, or wasn't ready in time.
        """
        with self._deadline(_START_SECONDS):
            ready = self._line()
        if not ready:
            assert self._process.stderr is not None
            said = self._process.stderr.read()[-_LAST_WORDS:].decode(errors="replace").strip()
            self.end()
            raise RunError(f"reward math: a process for comparing answers didn't start:\n{said}")

    def ask(self, question: dict[str, Any], seconds: float) -> Verdict:
        """
        Args:
            seconds: of a processor, that the question takes at most.
        """
        assert self._process.stdin is not None
        with self._deadline(_WALL * (seconds + 1)) as late:
            try:
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line()
            except OSError:
                line = b""
        if line:
            verdict: dict[str, bool] = json.loads(line)
            return verdict
        code = self._process.wait()
        self.end()
        if code == -signal.SIGPROF:
            return Undecided()
        if late.is_set():
            return Lost(f"no verdict within {_WALL * (seconds + 1):g} s; the machine is too busy")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Lost(f"the process that compares answers was ended by {how}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Any:
        """Within it, the process is ended when the time is over; yields whether it was."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()


def _end_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().end()
