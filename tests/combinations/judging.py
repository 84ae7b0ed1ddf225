"""What `--reward python` calls in these runs, and the rows that `--reward code` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.plan import resource


def score(completion: str) -> float:
    """A number from 0 to 2 that any other text changes."""
    return sum(map(ord, completion)) % 7 / 3


def rows(folder: Path) -> Path:
    """The built-in example's prompts, each with tests: a response is right if it is a program that prints nothing, as
    a bare number is."""
    lines = Path(resource("rlhf_plugins.starter:data/prompts_train.jsonl")).read_text(encoding="utf-8").splitlines()
    path = folder / "programs.jsonl"
    tests: list[dict[str, Any]] = [{**json.loads(line), "tests": [{"input": "", "output": ""}]} for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in tests), encoding="utf-8")
    return path
