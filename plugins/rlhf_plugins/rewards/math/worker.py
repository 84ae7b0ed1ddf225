"""A process that compares answers by math-verify: a JSON line in, a JSON line out. It ends with whoever started it,
since its input ends then; and by the system, in the middle of any computation, when one takes too long.

    {"gold": "1/2", "seconds": 5}                                      -> {"readable": true}
    {"gold": "1/2", "text": "it is 0.5", "boxed": null, "seconds": 5}  -> {"equal": true}
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

_MEMORY = 4 << 30
"""Bytes of address space: a tower of powers is refused by the system, not computed until the machine has none left."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not answer
    judge = _judge()
    judge({"gold": "1/2", "text": "$0.5$", "boxed": None})  # sympy imports much on first use
    out.write("{}\n")  # ready
    out.flush()
    os.dup2(1, 2)  # nobody reads it from here on, and a full pipe would stop this process
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        # Without a handler: SIGPROF ends the process even inside the product of two huge integers.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        answer = judge(asked)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _judge() -> Callable[[dict[str, Any]], dict[str, bool]]:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that it has no time limit of its own

    def read(text: str) -> Any:
        return parse(text, parsing_timeout=None)

    def judge(asked: dict[str, Any]) -> dict[str, bool]:
        gold = read(_formula(asked["gold"])) or read(asked["gold"])
        if "text" not in asked:
            return {"readable": bool(gold)}
        answer = read(asked["text"] if asked["boxed"] is None else _formula(asked["boxed"]))
        return {"equal": bool(gold and answer and verify(gold, answer, timeout_seconds=None))}

    return judge


def _formula(text: str) -> str:
    """As LaTeX, unless it says itself where its formula is: 2^{10} would be read as 2."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"


if __name__ == "__main__":
    main()
