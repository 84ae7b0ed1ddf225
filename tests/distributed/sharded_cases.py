"""The combinations that are tried, and the runs that they are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARDINGS: dict[str, dict[str, Any]] = {
    "fsdp2": {"backend": "fsdp2"},
    "zero1": {"mem": ["zero1"]},
    "zero1-offload": {"mem": [{"name": "zero1", "offload": ["optimizer"]}]},
    "zero2": {"mem": ["zero2"]},
    "zero2-offload": {"mem": [{"name": "zero2", "offload": ["optimizer"]}]},
    "zero3": {"mem": [{"name": "zero3", "keep_whole": 0}]},
    "zero3-whole": {"mem": ["zero3"]},  # every parameter of so small a model is kept whole by default
    "zero3-offload": {"mem": [{"name": "zero3", "keep_whole": 0, "offload": ["optimizer", "parameters"]}]},
}
RUNS: dict[str, dict[str, Any]] = {
    # Weight decay and a norm that clips, so that both are seen to be right; the rate falls from step to step.
    "sft": {"algo": "sft", "optim": {"learning_rate": 1e-3, "weight_decay": 0.1, "max_norm": 0.5,
                                     "schedule": "linear"}},
    "dpo": {"algo": "dpo", "optim": {"learning_rate": 1e-4, "weight_decay": 0.1, "schedule": "cosine"}},
    "ppo": {"algo": {"name": "ppo", "epochs": 2, "minibatches": 1, "kl_coef": 0.05},
            "optim": {"learning_rate": 3e-4, "schedule": "linear"}, "engine": {"max_new_tokens": 6}},
    # Groups that teach nothing are replaced in further rounds, and rows are learnt beside.
    "dapo": {"algo": {"name": "dapo", "group_size": 3, "minibatches": 2}, "ptx_coef": 0.5, "ptx_batch_size": 3,
             "optim": {"learning_rate": 3e-4}, "engine": {"max_new_tokens": 6}},
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "4bit": ("dpo", {"mem": ["fp32", "lora", "4bit"]}),
    "8bit": ("dpo", {"mem": ["fp32", "lora", "8bit"]}),
    "checkpointing": ("sft", {"mem": ["fp32", "checkpointing"]}),
    "dora": ("sft", {"mem": ["fp32", {"name": "lora", "dora": True, "targets": ["all-linear"]}]}),
    "a value head on the policy": ("ppo", {"mem": ["fp32"], "algo": {"name": "ppo", "value_model": "shared"}}),
    "a critic that warms up": ("ppo", {"mem": ["fp32"], "algo": {"name": "ppo", "critic_warmup": 2}}),
    "rounds, and rows beside": ("dapo", {"mem": ["fp32"], "batch_size": 5}),
    "a rank without rows": ("sft", {"mem": ["fp32"], "batch_size": 1, "micro_batch_tokens": 4096}),
    "bf16": ("sft", {"mem": ["bf16"]}),
    "bf16, lora": ("sft", {"mem": ["bf16", "lora"]}),
}
"""What else is to go with every sharding: a run, and what is another in its recipe."""
STEPS = {"sft": 8, "dpo": 8, "ppo": 4, "dapo": 4}
"""Loop steps that make 8 optimiser steps."""


def recipe(run: str, folder: Path, sharding: str = "", lora: bool = False, **more: Any) -> dict[str, Any]:
    """A recipe of a few seconds. Micro-batches are smaller than a rank's part, so that gradients accumulate."""
    spread = SHARDINGS[sharding] if sharding else {}
    content = {
        **RUNS[run],
        "batch_size": 12,
        "max_steps": STEPS[run],
        "eval_rows": 8,
        "eval_every": 4,
        "save_every": 4,
        "keep": 5,
        "micro_batch_tokens": 96,
        "track": "none",
        **spread,
        **more,
        "mem": [*more.get("mem", ["fp32", *(["lora"] if lora else [])]), *spread.get("mem", [])],
    }
    if run in ("ppo", "dapo"):
        content["reward"] = {"name": "python", "path": f"{rewarding(folder)}:judge"}
        content["data"] = [str(prompts(folder))]
    if run == "dapo":
        content["ptx_data"] = [str(completions(folder))]
    if lora:
        content["optim"] = {**content["optim"], "learning_rate": 1e-2 if run == "sft" else 3e-3}
    # Adam's own eps would turn rounding into a step of the whole rate wherever a gradient is about 0.
    content["optim"] = {**content["optim"], "eps": 1e-3}
    return content


def rewarding(folder: Path) -> Path:
    """A reward that can't judge some prompts, whose groups are then dropped, and knows the others' numbers."""
    path = folder / "rewarding.py"
    path.write_text(
        "from rlhf.api import Failed\n"
        "def judge(prompt, completion, hard):\n"
        "    return Failed('too hard') if hard else float(sum(map(ord, completion)) % 7) / 3\n",
        encoding="utf-8",
    )
    return path


def prompts(folder: Path) -> Path:
    """Prompts of many lengths, every fifth too hard to be judged."""
    path = folder / "prompts.jsonl"
    rows = [
        {"prompt": f"Question: What is {' plus '.join(str(i + j) for j in range(1 + i % 4))}?\nAnswer:",
         "hard": i % 5 == 0}
        for i in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def completions(folder: Path) -> Path:
    path = folder / "completions.jsonl"
    rows = [{"prompt": f"Question: What is {i} plus 3?\nAnswer:", "completion": f" {i + 3}"} for i in range(10, 21)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
