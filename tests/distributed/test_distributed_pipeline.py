"""A pipeline whose stages are of two processes each: the numbers of one, stage by stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli import main

COMMON: dict[str, Any] = {"mem": "fp32", "eval_rows": 6, "track": "none", "max_steps": 3}
ADAM = {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-3}
STAGES: dict[str, Any] = {
    "sft": {"algo": "sft", "batch_size": 8, "optim": ADAM},
    "reward": {"algo": "reward", "batch_size": 8, "model": "@sft", "optim": ADAM},
    "ppo": {"algo": {"name": "ppo", "epochs": 2}, "batch_size": 6, "model": "@sft", "optim": ADAM,
            "reward": ["model", "answer"], "roles": {"reward": {"model": "@reward"}}},
}  # fmt: skip


def carried_out(folder: Path, nproc: int) -> Path:
    """The folder of a pipeline that is done."""
    recipe = folder / f"{nproc}.yaml"
    recipe.write_text(yaml.safe_dump({**COMMON, "nproc": nproc, "stages": STAGES}, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "pipeline", str(recipe), "--output", str(folder / f"run-{nproc}")],
        capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"stage {i}/3 {stage}") for i, stage in enumerate(STAGES, 1)] == [1, 1, 1]
    return folder / f"run-{nproc}"


@pytest.mark.matrix_full
def test_stages_of_two_processes_hand_on_what_one_would(tmp_path: Path) -> None:
    one, two = carried_out(tmp_path, 1), carried_out(tmp_path, 2)
    for stage in STAGES:
        lines = [
            [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
            for folder in (one, two)
        ]
        assert len(lines[0]) == len(lines[1]) == 3
        for a, b in zip(*lines, strict=True):
            # float32 sums in another order, over stages that begin with what another has trained
            assert b["loss"] == pytest.approx(a["loss"], abs=2e-5), stage
        plan = json.loads((two / stage / "plan.json").read_text())
        assert plan["run"]["nproc"] == 2 and plan["backend"]["name"] == "ddp"
        assert json.loads((two / stage / "summary.json").read_text())["status"] == "done"
    ppo = json.loads((two / "ppo" / "plan.json").read_text())
    assert str(two / "sft" / "model") in {role["model"]["path"] for role in ppo["roles"]}


def test_a_pipeline_is_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each rank would carry out the whole of it, in the same folder."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["pipeline", "sft-reward-ppo", "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "torchrun started this as rank 0 of 2" in said and "nproc: 2" in said
    assert not (tmp_path / "out").exists()
