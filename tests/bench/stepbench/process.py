"""A measured process: its seconds and its peak resident memory, taken in the same way for both sides."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs


@attrs.frozen
class Finished:
    seconds: float
    peak_bytes: int


def run(command: Sequence[str], env: Mapping[str, str], log: Path) -> Finished:
    """Run a command to its end, its output to a file.

    Raises:
        RuntimeError: it failed; the message ends with the end of its output.
    """
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=dict(env), stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise RuntimeError(f"exit code {process.returncode} of {' '.join(command)}\n{tail}\n(all of it: {log})")
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(time.perf_counter() - started, usage.ru_maxrss * unit)
