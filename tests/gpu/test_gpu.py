"""Real runs on a GPU beside the same runs on the CPU: `nox -s gpu`, a few minutes on one CUDA GPU.

In float32 a GPU's numbers are the CPU's but for the order of sums, so that each run is held to the plain one on the
CPU: to its losses, since Adam divides a gradient by its size, and what differs in the eighth digit of a small one moves
its weight by up to a step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from truth import SMOLLM2, make_model

from at_work import wait_for_step

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU that this torch can use")]
VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM isn't installed")
STEPS = 4
EXACT = 1e-4
"""Relative, of a loss: sums of some hundred products, each rounded to 6e-8, over a few steps."""
HALF = 0.03
"""Products rounded to 8 bits (bfloat16) or 11 (float16)."""
QUANTISED = 0.2
"""Weights in 16 or 256 values: only what is broken is that far off."""

Losses = Callable[..., list[float]]


def run(output: Path, *words: str, gpu: bool = True) -> None:
    """`rlhf run` in a process of its own."""
    environment = os.environ if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command(output, *words), env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def command(output: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "rlhf", "run", *words, "--track", "none", "--output", str(output)]


def metric(output: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def summary(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, ...]]:
    """What a run of an algorithm is told."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"Question: What is {a} + {b}?\nAnswer:", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"}
        for a in range(8)
        for b in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(algo: str) -> tuple[str, ...]:
        return ("--algo", algo, *(("--data", str(data)) if algo in ("reward", "dpo") else ()),
                "--max-steps", str(STEPS), "--batch-size", "16", "--eval-rows", "0", "--save-every", "100")  # fmt: skip

    return words


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, usual: Callable[[str], tuple[str, ...]]) -> Losses:
    """Losses of a run there; each is run once."""
    kept: dict[tuple[str, ...], list[float]] = {}

    def losses(*words: str) -> list[float]:
        if words not in kept:
            output = tmp_path_factory.mktemp("cpu") / "run"
            run(output, *words, gpu=False)
            kept[words] = metric(output)
        return kept[words]

    return losses


@pytest.mark.parametrize("algo", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_run_is_the_cpus(algo: str, tmp_path: Path, usual: Callable[[str], tuple[str, ...]], on_cpu: Losses) -> None:
    """Also where responses are sampled: the noise of a token depends on its place and not on the device."""
    words = (*usual(algo), "--mem", "fp32")
    run(tmp_path / "run", *words)
    # Losses of sampled responses are near 0: sums of advantages of either sign, each of the size of 1.
    limit = {"abs": 10 * EXACT} if algo in ("ppo", "grpo") else {"rel": EXACT}
    found = metric(tmp_path / "run")
    assert found == pytest.approx(on_cpu(*words), **limit)
    assert len(set(found)) == STEPS
    assert summary(tmp_path / "run")["peak_device_bytes"] > 0


LORA = "--mem fp32,lora --optim.learning-rate 1e-3"
SHARED = "--mem fp32,lora,shared-base"


@pytest.mark.parametrize(
    ("algo", "plain", "its_own", "tolerance"),
    [
        ("sft", "--mem fp32", "--mem fp32,checkpointing", EXACT),
        ("sft", "--mem fp32", "--mem fp32,checkpointing --mem.checkpointing.offload", EXACT),
        ("sft", "--mem fp32", "--mem fp32,ema", EXACT),
        ("dpo", "--mem fp32", "--mem fp32 --mem reference=offload", EXACT),
        ("dpo", "--mem fp32", "--mem fp32 --mem reference=offload --mem.offload.to disk", EXACT),
        ("sft", "--mem fp32", "--mem fp32 --optim adamw-host", EXACT),
        ("sft", "--mem fp32", "--mem fp32 --optim adamw8bit", 100 * EXACT),  # moments of 8 bits
        ("sft", "--mem fp32", "--mem bf16", HALF),
        ("sft", "--mem fp32", "--mem fp16", HALF),
        ("sft", LORA, LORA, EXACT),
        ("ppo", SHARED, SHARED, HALF),  # of losses near 0
        ("sft", LORA, LORA.replace("lora", "lora,8bit"), QUANTISED),
        ("sft", LORA, LORA.replace("lora", "lora,4bit"), QUANTISED),
        ("sft", LORA, LORA.replace("fp32,lora", "bf16,lora,4bit,checkpointing"), QUANTISED),
    ],
)
def test_a_strategy_computes_what_the_plain_run_does(
    algo: str, plain: str, its_own: str, tolerance: float, tmp_path: Path,
    usual: Callable[[str], tuple[str, ...]], on_cpu: Losses,
) -> None:  # fmt: skip
    run(tmp_path / "run", *usual(algo), *its_own.split())
    expected = on_cpu(*usual(algo), *plain.split())
    assert metric(tmp_path / "run") == pytest.approx(expected, rel=tolerance, abs=EXACT)


def test_what_is_not_in_use_is_off_the_device(tmp_path: Path, usual: Callable[[str], tuple[str, ...]]) -> None:
    """The reference between its visits, and the moments of an optimiser that has them in the host's memory."""
    model = make_model(tmp_path / "model", {**SMOLLM2, "num_hidden_layers": 8})
    words = (*usual("dpo"), "--model", str(model), "--mem", "fp32")
    peaks = {}
    for name, more in {"all": (), "offload": ("--mem", "reference=offload"), "host": ("--optim", "adamw-host")}.items():
        run(tmp_path / name, *words, *more)
        peaks[name] = summary(tmp_path / name)["peak_device_bytes"]
    size = sum(path.stat().st_size for path in (tmp_path / "all" / "model").rglob("*.safetensors"))
    # But for what an allocator rounds up: its blocks are of 2 MiB, of a model of 230 MB.
    assert peaks["all"] - peaks["offload"] == pytest.approx(size, rel=0.05)
    assert peaks["all"] - peaks["host"] == pytest.approx(2 * size, rel=0.05)


def test_a_killed_run_goes_on(tmp_path: Path, usual: Callable[[str], tuple[str, ...]]) -> None:
    words = (*usual("ppo"), "--mem", "fp32", "--save-every", "1")
    run(tmp_path / "whole", *words)
    with subprocess.Popen(command(tmp_path / "killed", *words), stderr=subprocess.DEVNULL) as process:
        wait_for_step(process, tmp_path / "killed", 2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed: this shows nothing"
    run(tmp_path / "killed", *words, "--resume")
    assert metric(tmp_path / "killed") == pytest.approx(metric(tmp_path / "whole"), abs=10 * EXACT)


def test_ppo_learns_the_built_in_task(tmp_path: Path) -> None:
    run(tmp_path / "run", "--algo", "ppo")
    found = summary(tmp_path / "run")
    assert found["heldout_after"]["reward/mean"] > found["heldout_before"]["reward/mean"] + 0.2


@VLLM
@pytest.mark.parametrize("mem", ["fp32", "bf16", "fp32,lora"])
@pytest.mark.parametrize(
    "place",
    ["inside", "inside --engine.sleep", "beside --engine.carrier host", "beside --engine.carrier cuda-ipc"],
)
def test_vllm_serves_the_weights_that_are_trained(
    place: str, mem: str, tmp_path: Path, usual: Callable[[str], tuple[str, ...]]
) -> None:
    """Every sync is checked, which stops the run where log-probs differ by more than their precision."""
    words = ("--engine", "vllm", "--engine.place", *place.split(), "--engine.check-every", "1", "--mem", mem)
    run(tmp_path / "run", *usual("ppo"), *words, "--optim.learning-rate", "1e-3")
    assert len(metric(tmp_path / "run")) == STEPS


@VLLM
def test_vllms_log_probs_are_the_trainers(tmp_path: Path, usual: Callable[[str], tuple[str, ...]]) -> None:
    run(tmp_path / "run", *usual("ppo"), "--engine", "vllm", "--mem", "fp32", "--optim.learning-rate", "1e-3")
    assert max(metric(tmp_path / "run", "engine/logp_difference_max")) < 1e-3
