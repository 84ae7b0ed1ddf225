"""Commands, in this process and in one of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Rlhf = Callable[..., Ended]


def in_a_process(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "rlhf"]
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=60, check=False)
