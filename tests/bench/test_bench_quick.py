"""Our half of the benchmark on a tiny model, end to end. TRL's half takes environments of its own: `nox -s bench --
--quick` checks both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from stepbench import cli, sides
from stepbench.cases import QUICK
from transformers import AutoTokenizer

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("bench")
    given = cli.parser().parse_args(["--quick", "--dtype", "fp32"])
    return work, cli.prepare(given, cli.chosen("", 2, quick=True), {}, work, dict(os.environ))


@pytest.mark.parametrize("case", cli.chosen("", 2, quick=True), ids=lambda case: case.name)
def test_each_step_reads_the_rows_that_trl_is_given_for_it(prepared, case):
    work, made = prepared
    job = sides.Job(case=case, models=made["models"], items=made["items"].get(case.name, ()), work=work, seed=0,
                    checkpointing=False, dtype="fp32", env=dict(os.environ))  # fmt: skip
    side, floor = sides.ours(job)
    tokenizer = AutoTokenizer.from_pretrained(made["models"]["model"])
    if case.packed:
        sizes = made["items"][case.name]
    else:
        found = [json.loads(line) for line in Path(job.rows("-trl")).read_text().splitlines()]
        sizes = [
            # of pairs the prompt twice; one end token each; what PPO samples has no other end than its limit
            sum(len(tokenizer(row["prompt"] + row[name])["input_ids"]) + 1 for name in row if name != "prompt")
            or len(tokenizer(row["prompt"])["input_ids"]) + QUICK.new_tokens
            for row in found
        ]
    steps = [sum(sizes[i : i + case.batch]) for i in range(0, case.batch * case.total, case.batch)]
    assert side.tokens == pytest.approx(steps[case.warmup :], rel=0.02 if case.name == "ppo" else 0)
    assert side.sampled == ((64, 64) if case.name == "ppo" else ())  # 8 prompts, 8 tokens each
    assert len(floor) == len(side.seconds) == 2
    assert all(taken > least > 0 for taken, least in zip(side.seconds, floor, strict=True))
