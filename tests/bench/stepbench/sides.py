"""Run one case on one side, in a process of its own, and read what its steps took."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from stepbench import process
from stepbench.cases import Case
from stepbench.results import Side

LEARNING_RATE = "1e-6"


@attrs.frozen(kw_only=True)
class Job:
    """What both sides are given."""

    case: Case
    models: Mapping[str, str]  # model, ppo, reward: folders
    items: Sequence[int]  # tokens of the packed items, in the order they are taken; empty where nothing is packed
    work: Path
    seed: int
    checkpointing: bool
    dtype: str  # bf16 or fp32
    env: Mapping[str, str]

    @property
    def model(self) -> str:
        return self.models["ppo" if self.case.trainer == "ppo" else "model"]

    def rows(self, suffix: str = "") -> str:
        return str(self.work / "rows" / f"{self.case.name}{suffix}.jsonl")


def ours(job: Job) -> tuple[Side, list[float]]:
    """(the timed steps, their floors in seconds): through `rlhf run`, as a user would."""
    case, folder = job.case, job.work / "runs" / job.case.name
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable, "-m", "rlhf", "run", "--algo", case.algo, "--model", job.model, "--data", job.rows(),
        "--output", str(folder), "--max-steps", str(case.total), "--batch-size", str(case.batch),
        "--seed", str(job.seed), "--optim.learning-rate", LEARNING_RATE, "--mem", job.dtype,
        # nothing but the steps: one checkpoint at the very end, nothing held out, nobody listening
        "--save-every", str(case.total), "--eval-rows", "0", "--track", "none", *case.flags,
        *(("--model", f"reward={job.models['reward']}") if case.trainer == "ppo" else ()),
        *(("--mem", "checkpointing") if job.checkpointing else ()),
    ]  # fmt: skip
    finished = process.run(command, job.env, job.work / "logs" / f"{case.name}-ours.log")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "model")
    timed = steps[case.warmup :]
    return Side(
        seconds=tuple(map(step_seconds, timed)),
        tokens=tuple(map(step_tokens, timed)),
        sampled=tuple(round(step["response/length"] * case.batch) for step in timed if "response/length" in step),
        peak_bytes=finished.peak_bytes,
    ), [step["perf/floor_seconds"] for step in timed if step.get("perf/floor_seconds") is not None]


def step_seconds(metrics: Mapping[str, Any]) -> float:
    """All of a step, whatever it is spent on."""
    return float(metrics["time/step"])


def step_tokens(metrics: Mapping[str, Any]) -> int:
    """What the step read, from the speed that it tells."""
    return round(metrics["perf/tokens_per_second"] * step_seconds(metrics))


def trl(job: Job, python: str) -> Side:
    """The timed steps of TRL's own trainer."""
    case = job.case
    spec_path, result_path = (job.work / "logs" / f"{case.name}-{name}.json" for name in ("spec", "trl"))
    result_path.unlink(missing_ok=True)
    spec = {
        "trainer": case.trainer, "model": job.model, "reward": job.models["reward"], "rows": job.rows("-trl"),
        "output": str(job.work / "runs" / f"{case.name}-trl"), "steps": case.total, "batch": case.batch,
        "seed": job.seed, "lora": case.lora, "checkpointing": job.checkpointing, "dtype": job.dtype,
        "settings": dict(case.settings), "items": list(job.items),
    }  # fmt: skip
    spec_path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    command = [python, str(Path(__file__).parent / "peer.py"), str(spec_path), str(result_path)]
    finished = process.run(command, job.env, job.work / "logs" / f"{case.name}-trl.log")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    measured = {key: tuple(result[key][case.warmup :]) for key in ("seconds", "tokens", "sampled")}
    return Side(**measured, peak_bytes=finished.peak_bytes)
