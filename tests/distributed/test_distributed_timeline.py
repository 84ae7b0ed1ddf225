"""Two real processes: what a step is made of adds up to it, communication too; and samples of bf16 are weighed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import carry_out

from rlhf.timeline import PARTS

pytestmark = pytest.mark.matrix


def test_on_two_ranks_a_steps_phases_add_up_to_it(tmp_path: Path) -> None:
    words = ["run", "--algo", "ppo", "--mem", "bf16", "--max-steps", "4", "--eval-rows", "0", "--track", "none"]
    carry_out([[*words, "--output", str(tmp_path / "run")]], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        taken = {part: line[f"time/{part}"] for part in PARTS}
        assert all(seconds >= 0 for seconds in taken.values()) and taken["communication"] > 0
        assert sum(taken.values()) == pytest.approx(line["time/step"], rel=1e-9)
        # of both ranks: near 1 in bf16, and known because the policy was scored once more
        assert 0 < line["engine/logp_difference"] < 0.1 and line["importance/mean"] == pytest.approx(1.0, abs=0.05)
    whole = sum(line["time/step"] for line in lines)
    assert sum(line["time/other"] for line in lines) <= 0.02 * whole
