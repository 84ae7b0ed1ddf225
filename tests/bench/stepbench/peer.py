"""Train with TRL and stamp each step. Runs by TRL's own interpreter: needs nothing of this package.

    python peer.py SPEC.json RESULT.json

What a trainer's user would write, no more: the trainers are TRL's, called with a path and a data set. They are only
watched: a callback stamps the end of each step, and the collator counts the tokens of each batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

LEARNING_RATE = 1e-6


class Stamps(TrainerCallback):
    """When training began and each of its steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each step, with the loading of its batch and everything a trainer does around it."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Counting:
    """A collator that counts the tokens of each batch it makes, padding left out."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        mask = batch.get("attention_mask")  # a packed batch is one row without padding, and has none
        self.tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch


def common(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What every trainer is given; see docs/performance.md for the reasons."""
    return {
        "output_dir": spec["output"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["batch"],
        "learning_rate": LEARNING_RATE,
        "bf16": spec["dtype"] == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": spec["checkpointing"],
        "seed": spec["seed"],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **spec["settings"],
    }


def offline(spec: Mapping[str, Any], rows: list[dict[str, Any]], stamps: Stamps) -> tuple[Any, Counting, list[int]]:
    """SFT, reward modelling, DPO."""
    import trl
    from peft import LoraConfig

    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}[spec["trainer"]]
    config = getattr(trl, f"{name}Config")(train_sampling_strategy="sequential", **common(spec))
    trainer = getattr(trl, f"{name}Trainer")(
        model=spec["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[stamps],
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if spec["lora"] else None,
    )
    if spec["items"]:
        trainer.train_dataset = trainer.train_dataset.select(in_order(trainer.train_dataset, spec["items"]))
    counting = trainer.data_collator = Counting(trainer.data_collator)
    return trainer, counting, []


def in_order(packed: Any, wanted: list[int]) -> list[int]:
    """Numbers of packed items with these lengths, or those next to them: both sides see like batches in each step."""
    lengths = dict(enumerate(len(tokens) for tokens in packed["input_ids"]))
    order = []
    for length in wanted:
        order.append(min(lengths, key=lambda item: abs(lengths[item] - length)))
        del lengths[order[-1]]
    return order


def ppo(spec: Mapping[str, Any], rows: list[dict[str, Any]], stamps: Stamps) -> tuple[Any, Counting, list[int]]:
    """PPO with four models: the trained two in float32, the frozen two in the products' precision, as ours are."""
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    settings = common(spec)
    del settings["max_steps"]
    classifier = AutoModelForSequenceClassification.from_pretrained
    frozen = torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    dataset = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows])
    trainer = PPOTrainer(
        args=PPOConfig(total_episodes=spec["steps"] * spec["batch"], **settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=frozen),
        value_model=classifier(spec["model"], num_labels=1, dtype=torch.float32),
        reward_model=classifier(spec["reward"], num_labels=1, dtype=frozen),
        train_dataset=dataset,
        eval_dataset=dataset,  # asked for, not used
        callbacks=[stamps],
    )
    expected = "bf16" if spec["dtype"] == "bf16" else "no"
    if trainer.accelerator.mixed_precision != expected:
        raise SystemExit(f"PPOTrainer's mixed precision is {trainer.accelerator.mixed_precision}, not {expected}")
    counting = Counting(trainer.data_collator)
    # Its own loader shuffles and has no option that says otherwise; both sides are to see the same rows in each step.
    trainer.dataloader = DataLoader(dataset, batch_size=spec["batch"], collate_fn=counting)
    sampled: list[int] = []
    generate = trainer.policy_model.generate

    def counted(*args: Any, input_ids: Any, **options: Any) -> Any:
        output = generate(*args, input_ids=input_ids, **options)
        sampled.append(output.sequences[:, input_ids.shape[1] :].numel())
        return output

    trainer.policy_model.generate = counted
    return trainer, counting, sampled


# What `accelerate launch --mixed_precision bf16` sets. The other trainers have it from `bf16`; PPOTrainer makes an
# Accelerator of its own, and trains in float32 without it.
MIXED_PRECISION = {"ACCELERATE_MIXED_PRECISION": "bf16"}


def main(spec_path: str, result_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text())
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    stamps = Stamps()
    if spec["trainer"] == "ppo" and spec["dtype"] == "bf16":
        os.environ.update(MIXED_PRECISION)
    trainer, counting, sampled = (ppo if spec["trainer"] == "ppo" else offline)(spec, rows, stamps)
    trainer.train()
    seconds = stamps.seconds()
    if len(seconds) != spec["steps"]:
        raise SystemExit(f"TRL made {len(seconds)} steps of {spec['steps']}")
    result = {
        "seconds": seconds,
        "tokens": [n + (sampled[i] if sampled else 0) for i, n in enumerate(counting.tokens[: spec["steps"]])],
        "sampled": sampled,
    }
    Path(result_path).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
