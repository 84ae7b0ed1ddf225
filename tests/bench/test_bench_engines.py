"""The engines' benchmark runs what it says, on a tiny model: its numbers are of the run."""

from __future__ import annotations

import json
from pathlib import Path

import engines
import pytest


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--only", "hf; nosuch"]) == 2
    assert "--only nosuch: no such case; there are hf; vllm inside; " in capsys.readouterr().err


def test_a_row_of_the_table() -> None:
    found = {"speed": 251.6, "rollout": 30.0, "sync": 0.5, "step": 40.0}
    assert engines.cells("hf", found) == ("hf", "252", "30.00", "0.50", "40.00", "75%", "1%")


@pytest.mark.matrix
def test_the_numbers_are_of_the_run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--only", "hf", "--dtype", "fp32", "--model", str(tiny_model), "--prompts", "4", "--steps", "2"]
    line += ["--tokens", "6"]
    assert engines.main([*line, "--work", str(tmp_path)]) == 0
    lines = (tmp_path / "runs" / "hf" / "metrics.jsonl").read_text().splitlines()
    _, *timed = map(json.loads, lines)
    assert len(timed) == 2
    row = capsys.readouterr().out.splitlines()[-1]
    for part in ("rollout", "sync", "step"):
        assert f" {(timed[0][f'time/{part}'] + timed[1][f'time/{part}']) / 2:.2f} " in row
    rows = [json.loads(line) for line in (tmp_path / "rows" / "engines.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 3 and len({len(row["prompt"]) for row in rows}) > 6
