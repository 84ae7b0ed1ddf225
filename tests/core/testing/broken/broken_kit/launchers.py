"""Launchers, each with one error."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence

from rlhf.api import Launcher


class Plain(Launcher):
    """Processes on this machine, right in all."""

    names: Sequence[str] = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def launch(self, run: Callable[[], int], command: Sequence[str]) -> int:
        count = self.context.plan.run.nproc
        if count == 1:
            return run()
        return self.wait([self.start(command, rank, count) for rank in range(count)])

    def start(self, command: Sequence[str], rank: int, count: int) -> subprocess.Popen[bytes]:
        told = (rank, rank, count, count, "127.0.0.1", 29500)
        environment = dict(zip(self.names, map(str, told), strict=False))
        return subprocess.Popen(command, env={**os.environ, **environment})

    def wait(self, ranks: list[subprocess.Popen[bytes]]) -> int:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
            rank.wait()
        return max(abs(rank.returncode) for rank in ranks)


class First(Plain):
    """The first rank alone."""

    def launch(self, run: Callable[[], int], command: Sequence[str]) -> int:
        return self.wait([self.start(command, 0, self.context.plan.run.nproc)])


class Silent(Plain):
    """Tells nobody where to meet."""

    names = Plain.names[:4]


class Content(Plain):
    """Ends well, whatever its ranks do."""

    def wait(self, ranks: list[subprocess.Popen[bytes]]) -> int:
        super().wait(ranks)
        return 0


class Patient(Plain):
    """Waits for every rank, for a while."""

    def wait(self, ranks: list[subprocess.Popen[bytes]]) -> int:
        until = time.monotonic() + 2
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(0.01)
        return super().wait(ranks)
