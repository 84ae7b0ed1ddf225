"""Tiny random models, and memory strategies put to work as the core does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf.interfaces import Context, LoadSpec, MemoryStrategy
from rlhf.options import structure
from rlhf.plan import Component, Plan, phase_order
from rlhf.recipe import RunOptions
from rlhf.registry import resolve
from rlhf_plugins.memory import rlhf_memory
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.hf import HFPolicy

SHAPE = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 0}
ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, **ROPE, num_key_value_heads=1, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SHAPE, **ROPE, num_key_value_heads=1, max_position_embeddings=64),
    "gpt2": GPT2Config(**SHAPE, n_embd=32, n_layer=4, n_head=2, n_positions=64),
}


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(family: str, head: str = "lm") -> nn.Module:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict())
    if head == "scalar":
        config.num_labels = 1
    return cast(nn.Module, auto.from_config(config).eval())


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """A model's folder with a tokenizer."""

    def save(family: str, head: str = "lm") -> str:
        place = tmp_path / f"{family}-{head}"
        cast(Any, model(family, head)).save_pretrained(place)
        inner = Tokenizer(tokenizer_models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(place)
        return str(place)

    return save


@pytest.fixture
def policy() -> HFPolicy:
    return HFPolicy(HFPolicyConfig(), Context(cast(Plan, _PlanOf())))


class _PlanOf:
    run = RunOptions()


@pytest.fixture
def strategies() -> Callable[..., list[MemoryStrategy]]:
    """Strategies by name, `lora={"rank": 4}` giving options, in the order in which they act."""

    def make(*names: str, **options: dict[str, Any]) -> list[MemoryStrategy]:
        entries = {entry.name: entry for entry in rlhf_memory()}
        components = []
        for name in (*names, *options):
            config, problems = structure(entries[name].config, options.get(name, {}), f"--mem.{name}.")
            assert not problems, problems
            components.append(Component(entries[name], config))
        components.sort(key=phase_order)
        return [resolve(c)(c.config, Context(cast(Plan, None), label=c.key)) for c in components]

    return make


@pytest.fixture
def prepared(policy: HFPolicy) -> Callable[..., tuple[nn.Module, LoadSpec]]:
    """A module loaded, adapted and wrapped."""

    def prepare(
        path: str, acting: list[MemoryStrategy], head: Any = "lm", trainable: bool = True
    ) -> tuple[nn.Module, LoadSpec]:
        spec = LoadSpec("policy", path, head, trainable, "keep", "cpu", seed=5)
        for strategy in acting:
            spec = strategy.load(spec)
        module = policy.load(spec)
        for strategy in acting:
            module = strategy.adapt(module, spec)
        for strategy in acting:
            module = strategy.wrap(module, spec)
        return module, spec

    return prepare


@pytest.fixture
def ids() -> torch.Tensor:
    """int64 [3, 7], token ids."""
    return torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(1))
