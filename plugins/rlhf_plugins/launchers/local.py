"""Several ranks on this machine, each in a process of its own; a single one stays in the process that was started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from rlhf.api import PARENT_PIPE, REPORT, Interrupted, Launcher, Report, RunError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 8.0
"""Seconds that ranks have to end by themselves once one has failed: to say what they know."""
_LAST_WORDS = 12
"""Lines of what a rank printed before it was killed."""


class Local(Launcher):
    """See the module."""

    def launch(self, run: Callable[[], int], command: Sequence[str]) -> int:
        count = self.context.plan.run.nproc
        if count == 1:
            return run()
        folder = Path(tempfile.mkdtemp(prefix="rlhf-ranks-"))
        try:
            return _Group(command, count, self.context.plan.machine.cpus, folder).wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@attrs.define
class _Rank:
    """One process."""

    number: int
    process: subprocess.Popen[bytes]
    report: Path
    log: Path

    def said(self) -> Report | None:
        """What ended it badly, by its own word."""
        try:
            return Report(**json.loads(self.report.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def last_words(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n    ".join(["; it last printed:", *lines[-_LAST_WORDS:]]) if lines else ""


class _Group:
    """The ranks of a run. They are in sessions of their own, so that Ctrl-C reaches this process alone, which hands it
    on once; each ends by itself when this process is gone."""

    def __init__(self, command: Sequence[str], count: int, cpus: int, folder: Path) -> None:
        self._read, self._write = os.pipe()  # ranks read from it, and nobody ever writes: its end is this process's
        self._ranks: list[_Rank] = []
        self._asked: list[int] = []  # signals that were handed on
        self._kill_at = float("inf")
        common = {
            **os.environ,
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "RLHF_STARTED_BY": "rlhf run --nproc",
            PARENT_PIPE: str(self._read),
        }
        common.setdefault("OMP_NUM_THREADS", str(max(1, cpus // count)))
        if sys.platform == "linux":
            common.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may not resolve to it
        with self._signals():
            for number in range(count):
                self._ranks.append(self._start(command, number, common, folder))
            self._code = self._watch()

    def wait(self) -> int:
        return self._code

    def _start(self, command: Sequence[str], number: int, common: Mapping[str, str], folder: Path) -> _Rank:
        report, log = folder / f"rank-{number}.json", folder / f"rank-{number}.log"
        environment = {**common, "RANK": str(number), "LOCAL_RANK": str(number), REPORT: str(report)}
        streams: dict[str, Any] = {}
        if number:  # only rank 0 prints; what others say is shown where they fail
            streams = {"stdout": log.open("wb"), "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(self._read,),
            **streams,
        )
        return _Rank(number, process, report, log)

    def _watch(self) -> int:
        """Until all have ended.

        Raises:
            Whatever the rank that failed first raised; RunError where it was killed.
        """
        try:
            while any(rank.process.poll() is None for rank in self._ranks):
                if any(rank.process.poll() not in (None, 0, 130) for rank in self._ranks):
                    self._kill_at = min(self._kill_at, time.monotonic() + _GRACE)
                if time.monotonic() > self._kill_at:
                    break
                time.sleep(0.05)
        finally:
            late = [rank for rank in self._ranks if rank.process.poll() is None]
            for rank in late:
                rank.process.kill()
            for rank in self._ranks:
                rank.process.wait()
            os.close(self._read)
            os.close(self._write)
        bad = [rank for rank in self._ranks if rank not in late and rank.process.returncode != 0]
        if (bad or late) and self._asked and all(rank.process.returncode == -self._asked[0] for rank in bad):
            name = signal.Signals(self._asked[0]).name
            raise Interrupted(f"stopped at once by {name}; what was checkpointed stays")
        if bad:
            raise self._cause(bad)
        return 0

    def _cause(self, bad: Sequence[_Rank]) -> BaseException:
        """What ended the run: a rank that was killed, else one that failed by itself, else one that lost another."""

        def order(rank: _Rank) -> tuple[int, int]:
            report = rank.said()
            if report is None:
                return (0, rank.number)
            return (3 if report.lost else 2 if report.code == 130 else 1, rank.number)

        first = min(bad, key=order)
        report = first.said()
        if report is not None:
            return report.error(first.number)
        code = first.process.returncode
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                how += "; the system does that when memory runs out"
        return RunError(f"rank {first.number} of {len(self._ranks)} was ended by {how}{first.last_words()}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def hand_on(number: int, frame: Any) -> None:
            self._asked.append(number)
            if self._asked.count(signal.SIGINT) > 1:  # one that waits for another rank doesn't hear it
                self._kill_at = min(self._kill_at, time.monotonic() + _GRACE)
            for rank in self._ranks:
                if rank.process.poll() is None:
                    rank.process.send_signal(number)

        try:
            before = {number: signal.signal(number, hand_on) for number in _FORWARDED}
        except ValueError:  # not in the main thread: its owner looks after signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
