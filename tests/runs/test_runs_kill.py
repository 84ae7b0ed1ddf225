"""A run killed with SIGKILL at random moments and resumed each time equals one never killed, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from at_work import MACHINE_DEPENDENT, wait_for_step

RUNS = {
    "ppo": ("--algo", "ppo", "--algo.minibatches", "2", "--algo.epochs", "2", "--algo.kl-control", "adaptive",
            "--algo.normalise-rewards", "--max-steps", "12", "--batch-size", "16", "--eval-rows", "16",
            "--eval-every", "4"),
    "dpo": ("--algo", "dpo", "--mem", "lora", "--max-steps", "14", "--batch-size", "8", "--eval-rows", "16",
            "--data", "{data}"),
}  # fmt: skip


def command(arguments: tuple[str, ...], output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rlhf", "run", *arguments, "--save-every", "1", "--output", str(output), *more]


def metrics(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE_DEPENDENT)} for line in lines]


def weights(output: Path) -> dict[str, str]:
    files = sorted((output / "model").rglob("*.safetensors"))
    assert files
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.matrix if x != "ppo" else ()) for x in RUNS],  # one of them in every run
)
def test_killed_at_random_moments_equals_never_killed(name: str, tmp_path: Path) -> None:
    # Few enough pairs that the run passes over them twice: the second pass uses log-probs kept from the first.
    rows = [
        {"prompt": f"Question: What is {a} + 1?\nAnswer:", "chosen": f" {a + 1}", "rejected": " 5"}
        for a in range(10, 44)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = tuple(part.format(data=tmp_path / "pairs.jsonl") for part in RUNS[name])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(arguments, whole), check=True, env=environment, capture_output=True)

    moments = random.Random(name)
    steps = len(metrics(whole))
    for target in sorted(moments.sample(range(1, steps), 5)):
        process = subprocess.Popen(command(arguments, killed, "--resume"), env=environment, stderr=subprocess.DEVNULL)
        wait_for_step(process, killed, target)
        time.sleep(moments.uniform(0.0, 0.2))  # anywhere in a step, or in the writing of a checkpoint
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: the test shows nothing"
    done = subprocess.run(command(arguments, killed, "--resume"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert metrics(killed) == metrics(whole)
    assert weights(killed) == weights(whole)
    summaries = [json.loads((place / "summary.json").read_text()) for place in (whole, killed)]
    assert summaries[0]["heldout_before"] == summaries[1]["heldout_before"]
    assert summaries[0]["heldout_after"] == summaries[1]["heldout_after"]


@pytest.mark.matrix
def test_a_finished_run_that_is_killed_while_it_goes_on_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os\n\ndef score(completions):\n"
        "    if os.environ.get('DIES') and os.path.isdir('run/checkpoints/step-000003'): os._exit(9)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    words = ("--algo", "ppo", "--batch-size", "8", "--eval-rows", "0", "--track", "none",
             "--reward", "python", "--reward.python.path", "dies.py:score")  # fmt: skip

    def run(steps: int, *more: str, dies: str = "") -> subprocess.CompletedProcess[bytes]:
        line = command(words, Path("run"), "--max-steps", str(steps), *more)
        return subprocess.run(line, cwd=tmp_path, env={**os.environ, "DIES": dies}, capture_output=True, check=False)

    assert run(2).returncode == 0
    assert run(6, "--resume", dies="yes").returncode == 9
    ended = run(6, "--resume")
    assert ended.returncode == 0 and b"already finished" not in ended.stderr
    assert [int(line["step"]) for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert b"already finished after 6 steps" in run(6, "--resume").stderr


@pytest.mark.matrix
def test_a_run_that_another_was_quicker_to_begin_leaves_it_alone(tmp_path: Path) -> None:
    """Both looked at an empty folder; while this one imports its reward, another begins there and ends."""
    words = ("--algo", "ppo", "--batch-size", "8", "--max-steps", "1", "--eval-rows", "0", "--track", "none")
    subprocess.run(command(words, tmp_path / "other"), check=True, capture_output=True)
    (tmp_path / "slow.py").write_text(
        "import shutil\n\ndef score(completion): return 0.0\n\n"
        f"shutil.copytree({str(tmp_path / 'other')!r}, {str(tmp_path / 'run')!r})\n"
    )
    given = ("--reward", "python", "--reward.python.path", f"{tmp_path / 'slow.py'}:score")
    ended = subprocess.run(
        command((*words, *given), tmp_path / "run"), capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ended.returncode == 2 and "holds a run already" in ended.stderr
    assert weights(tmp_path / "run") == weights(tmp_path / "other")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "other")
