"""A vLLM in a child process of this one, as a `Sampler`: a server that is this process's own.

It has a session of its own, so that Ctrl-C doesn't reach it, and ends with this process, however that ends: it reads
from a pipe that nobody else holds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import NoReturn

import attrs
import torch

from rlhf.api import Problem, RequestError, RunError, here
from rlhf_plugins.engines.vllm import wire
from rlhf_plugins.engines.vllm.remote import Deadlines, Server
from rlhf_plugins.engines.vllm.sampler import EngineLost, Settings
from rlhf_plugins.engines.vllm.spread import gpus_of

_OF_RANK = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"})
_OF_RANKS = ("ROLE_", "MASTER_", "TORCHELASTIC_", "RLHF_")
"""Environment that speaks of the trainer's ranks: the engine is none of them."""
_LAST_WORDS = 20
"""Lines of what a process printed before it ended."""
_GRACE = 5.0
"""Seconds to end by itself."""


class Beside(Server):
    """See the module."""

    _comes = True

    def __init__(
        self,
        settings: Settings,
        deadlines: Deadlines,
        *,
        sampler: str = wire.IN_PROCESS,
        device: str = "cpu",
        name: str = "",
        again: bool = False,
        carrier: str = "host",
        only: bool = False,
    ) -> None:
        """Start one, and wait until it is ready.

        Args:
            device: of this process, whose GPU it shares: "cuda:1".
            again: there was one before.
            carrier, only: as of a `Server`.

        Raises:
            RequestError: it can't be like that, or the only way that weights may go isn't open; of the first one.
            EngineLost: it ended, or wasn't ready in time.
        """
        token = secrets.token_urlsafe(32)
        self._printed: deque[str] = deque(maxlen=_LAST_WORDS)
        self._killed = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_plugins.engines.vllm.serve", "--beside"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment_of(device, int(settings.arguments.get("tensor_parallel_size", 1))),
            start_new_session=True,
        )
        atexit.register(self._kill)
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._name = f"{name or 'the vLLM beside'} (process {self._process.pid})"
        told = {"settings": attrs.asdict(settings), "token": token, "sampler": sampler}
        try:
            port = self._told(json.dumps(told) + "\n", deadlines.start)
            super().__init__(
                f"http://127.0.0.1:{port}", token, {}, deadlines, name=self._name, again=again, carrier=carrier,
                device=device, only=only,
            )  # fmt: skip
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End it: by a word, else by force."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, RunError):
                self._exchange("/shutdown", b"", "it to end", _GRACE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self._kill()
        self._remove()

    def _told(self, line: str, seconds: float) -> int:
        """Tell it what to serve; it says where."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()  # then reading ends

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            stdin.write(line.encode())
            stdin.flush()
            said = stdout.readline()
        except OSError:  # it ended before it read
            said = b""
        finally:
            timer.cancel()
        if not said.strip().isdigit():
            self.lost("it to start", seconds, TimeoutError() if late.is_set() else OSError("it ended"))
        return int(said)

    def _over(self) -> bool:
        return self._process.poll() is not None

    def lost(self, what: str, seconds: float, error: OSError) -> NoReturn:
        code: int | None = None
        if not isinstance(error, TimeoutError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # the connection breaks before the process is gone
                code = self._process.wait(_GRACE)
        if code is None:
            waited = isinstance(error, TimeoutError)
            how = (
                f"waited {seconds:g} s for {what} in vain" if waited else f"was lost while waiting for {what}: {error}"
            )
            how += "; it is ended"
            self._kill()
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            how += f" while waiting for {what}"
        self._reader.join(1.0)
        words = "\n    ".join(["; it last printed:", *self._printed]) if self._printed else ""
        raise EngineLost(f"{self._name} {how}{words}") from error

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self._process.stderr:
                self._printed.append(line.decode(errors="replace").rstrip()[:500])

    def _kill(self) -> None:
        if self._killed:  # its number may be another's by now
            return
        self._killed = True
        atexit.unregister(self._kill)
        with contextlib.suppress(OSError):  # workers of its own are in its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def environment_of(device: str, workers: int = 1) -> dict[str, str]:
    """Of a process beside this one: it is none of the run's ranks, sees this rank's GPU alone, or those of its workers,
    finds the same modules, and has as many threads, since one waits while the other works.

    Raises:
        RequestError: there aren't GPUs enough.
    """
    found = {
        name: value for name, value in os.environ.items() if name not in _OF_RANK and not name.startswith(_OF_RANKS)
    }
    kind, _, number = device.partition(":")
    if kind == "cuda":
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        wanted = gpus_of(int(number or 0), here().local_size if workers > 1 else 1, workers)
        if visible and max(wanted) >= len(visible):
            what = f"--engine.tensor-parallel-size {workers}: {len(visible)} GPUs are visible here, and the engine "
            raise RequestError(Problem(f"{what}beside this rank would take number {max(wanted)}", "fewer ranks"))
        found["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in wanted)
    if workers > 1 or "OMP_NUM_THREADS" not in found:
        found["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // workers, 1))
    found["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return found
