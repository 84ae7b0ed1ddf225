"""Programs with limits, each in processes of its own (`jail`), and what became of them. Imports no torch.

It keeps an honest mistake from doing harm: an endless loop, all of the memory, a fork bomb, a file in the wrong place.
It is no boundary against somebody who is after this machine: then run all of it in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import psutil

from rlhf_plugins.rewards.code.cases import Case, Output, Statement, Value, decode

_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/sbin", "/sys", "/usr")
_HIDDEN = ("/home", "/root", "/run", "/var/tmp", "/dev/shm", "/srv", "/mnt", "/media")
_GRACE = 5.0
"""Seconds to end what a program left."""
_ENDED_BY = (256 - signal.SIGXCPU, 256 - signal.SIGKILL)
"""Exit codes of a program that the limit of a processor's time has ended."""


@attrs.frozen(kw_only=True)
class Limits:
    """Of one program, run once."""

    seconds: int = 5
    """Of a processor."""
    wall_seconds: float = 15.0
    memory: int = 512 << 20
    """Bytes of address space."""
    disk: int = 16 << 20
    """Bytes of one file; of all of them where it has a folder in memory."""
    processes: int = 16
    """Beside itself; threads count."""
    files: int = 64
    """Open at once."""
    output: int = 1 << 20
    """Bytes that it may print, or that a value may take."""

    def of_system(self) -> dict[str, int]:
        """By the names of `resource.RLIMIT_`."""
        return {
            "CPU": self.seconds,
            "AS": self.memory,
            "FSIZE": self.disk,
            "NPROC": self.processes,
            "NOFILE": self.files,
            "CORE": 0,
        }


@attrs.frozen
class Verdict:
    """Of one test."""

    what: Literal["passed", "failed", "late", "none"]
    """"late": the program took too long, which is a failure too. "none": it could not be run, for no fault of its."""
    why: str = ""


@attrs.frozen
class _Ran:
    """A process that has ended."""

    code: int
    printed: bytes
    told: bytes
    said: bytes
    ended: Literal["itself", "late", "flood", "over"]


class Sandbox:
    """Runs programs against tests."""

    def __init__(
        self,
        limits: Limits,
        *,
        python: str | None = None,
        isolate: bool = True,
        over: threading.Event | None = None,
    ) -> None:
        """
        Args:
            python: the interpreter; left out, the one that this one is made of, without what is installed in it.
            isolate: try to give programs namespaces of their own.
            over: set when nobody waits any more.
        """
        self._limits = limits
        self._python = python or getattr(sys, "_base_executable", "") or sys.executable
        self._isolate = isolate and sys.platform == "linux"
        self._hide = _hidden()
        self._over = over or threading.Event()
        self._others: int | None = None

    def isolated(self) -> tuple[bool, str]:
        """(whether programs have namespaces of their own here, why not).

        Raises:
            OSError: they can't be run at all.
        """
        nothing, some = Output("", ""), "import decimal, random, socket"
        why = "not asked for" if sys.platform == "linux" else "Linux alone has them"
        if self._isolate:
            ran, started = self._run(some, nothing)
            if started is not None and started["started"]:
                return True, ""
            self._isolate, why = False, _why(ran) if started is None else started["why"]
        ran, started = self._run(some, nothing)
        if started is None:
            raise OSError(_why(ran))
        if ran.code != 0:
            nobody = ", since they run as nobody" if os.geteuid() == 0 else ""
            raise OSError(f"programs can't import what comes with {self._python}{nobody}; nor be isolated: {why}")
        return False, why

    def verdict(self, program: str, case: Case) -> Verdict:
        """Whether the program passes the test."""
        try:
            ran, started = self._run(program, case)
        except OSError as error:
            return Verdict("none", f"no process could be started: {error}")
        if started is None or not started["started"] or ran.ended == "over":
            return Verdict("none", _why(ran))
        if ran.ended == "flood":
            return Verdict("failed", f"more than {self._limits.output} bytes of output")
        if ran.ended == "late" or ran.code in _ENDED_BY:
            return Verdict("late")
        if isinstance(case, Output):
            if ran.code != 0:
                return Verdict("failed", f"exit code {ran.code}")
            right = case.holds(ran.printed.decode("utf-8", "replace"))
            return Verdict("passed") if right else Verdict("failed", "another output")
        return self._of_value(case, ran, started["secret"])

    def _of_value(self, case: Value | Statement, ran: _Ran, secret: str) -> Verdict:
        try:
            _, line = ran.told.splitlines()  # one that says twice what became of it says nothing
            told = json.loads(line)
            if not secrets.compare_digest(told["secret"], secret):
                raise ValueError
            if "failed" in told:
                return Verdict("failed", str(told["failed"])[:80])
            right = isinstance(case, Statement) or case.holds(decode(told["value"]))
        except Exception:  # the program may write what it likes, and a check of its value raise what it likes
            return Verdict("failed", "no value")
        return Verdict("passed") if right else Verdict("failed", "another value")

    def _run(self, program: str, case: Case) -> tuple[_Ran, Mapping[str, Any] | None]:
        """What it left, and what the jail told before it began; None where it never did."""
        folder = tempfile.mkdtemp(prefix="rlhf-code-")
        secret = secrets.token_hex(16)
        try:
            with tempfile.TemporaryFile() as given:
                if isinstance(case, Output):
                    given.write(case.stdin.encode("utf-8", "replace"))
                    given.seek(0)
                ran = self._ended(program, case, secret, folder, given.fileno())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            started: dict[str, Any] = json.loads(ran.told.split(b"\n", 1)[0])
            return ran, {"started": started["started"], "why": started["why"], "secret": secret}
        except (ValueError, LookupError, TypeError):
            return ran, None

    def _ended(self, program: str, case: Case, secret: str, folder: str, given: int) -> _Ran:
        """Start it, wait, and sweep up."""
        others = 0 if self._isolate else self._count_others()  # in a namespace of its own it has none
        told, report = os.pipe()
        try:
            process = subprocess.Popen(
                # -I would leave the hash seed out, and with it the order of sets; the rest of it holds by the empty
                # environment and the jail.
                [self._python, "-s", "-S", str(_JAIL)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                pass_fds=(report, given),
                start_new_session=True,
            )
        except OSError:
            os.close(told)
            raise
        finally:
            os.close(report)
        asked = {
            "program": program,
            "prints": isinstance(case, Output),
            "statement": isinstance(case, Statement),
            "setup": case.setup if isinstance(case, Value) else case.source if isinstance(case, Statement) else "",
            "expression": case.expression if isinstance(case, Value) else "",
            "secret": secret,
            "report": report,
            "input": given,
            "keep": [report, given],
            "work": folder,
            "isolate": self._isolate,
            "hide": self._hide,
            "bytes": self._limits.disk,
            "limits": self._limits.of_system(),
            "others": others,
        }
        try:
            return self._watch(process, told, (json.dumps(asked) + "\n").encode())
        finally:
            _kill(process)
            os.close(told)

    def _watch(self, process: subprocess.Popen[bytes], told: int, asked: bytes) -> _Ran:
        """Until it has ended, or must."""
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with contextlib.suppress(OSError):  # it ended at once: what it said tells why
            process.stdin.write(asked)
            process.stdin.flush()
        end = time.monotonic() + self._limits.wall_seconds
        streams = {process.stdout.fileno(): bytearray(), told: bytearray(), process.stderr.fileno(): bytearray()}
        open_ones = set(streams)
        ended: Literal["itself", "late", "flood", "over"] = "itself"
        while True:
            gone = process.poll() is not None  # before reading: what it wrote is there then
            ready, _, _ = select.select(list(open_ones), [], [], 0.0 if gone else 0.02)
            for stream in ready:
                found = os.read(stream, 65536)
                if not found:
                    open_ones.discard(stream)
                streams[stream] += found
            if any(len(content) > self._limits.output + 4096 for content in streams.values()):
                ended = "flood"
            elif not gone and time.monotonic() > end:
                ended = "late"
            elif self._over.is_set():
                ended = "over"
            if ended != "itself" or (gone and not ready):
                break
            if not open_ones and not gone:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
        printed, said_of, errors = (bytes(content) for content in streams.values())
        if ended == "itself" and len(printed) > self._limits.output:
            ended = "flood"
        return _Ran(process.returncode if gone else -1, printed, said_of, errors, ended)

    def _count_others(self) -> int:
        """Tasks of the user that programs run as, which the system counts along where they have no namespace."""
        if self._others is None:
            user = os.geteuid() or 65534
            self._others = 64
            for process in psutil.process_iter(["uids", "num_threads"]):
                uids = process.info["uids"]
                if uids is not None and uids.real == user:
                    self._others += process.info["num_threads"] or 1
        return self._others


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It, and all that is left: by itself, when its input ends, else by force."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _why(ran: _Ran) -> str:
    if ran.ended == "over":
        return "stopped"
    said = ran.said.decode("utf-8", "replace").strip().splitlines()
    return f"the process for programs ended before it began: {said[-1] if said else f'exit code {ran.code}'}"


def _hidden() -> list[str]:
    """Folders out of sight: homes, where temporary files are, where this process is. Never the system's own, without
    which no program runs."""
    wanted = [*_HIDDEN, os.path.expanduser("~"), os.getcwd()]
    folders = dict.fromkeys(os.path.realpath(folder) for folder in wanted)
    return [
        folder
        for folder in folders
        if folder != "/"
        and not any(f"{folder}/".startswith(f"{own}/") or own == folder for own in _SYSTEM if own != "/dev")
    ]


@functools.cache
def isolation(python: str | None) -> tuple[bool, str]:
    """Of this machine: see `Sandbox.isolated`.

    Raises:
        OSError: programs can't be run at all.
    """
    return Sandbox(Limits(), python=python).isolated()
