"""Tiny random models in folders, and engines attached to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from fake_server import Running
from rlhf.interfaces import Context, LoadSpec
from rlhf.plan import Plan
from rlhf.recipe import RunOptions
from rlhf.sequences import Prompt, Sample
from rlhf_plugins.engines import HFEngineConfig
from rlhf_plugins.engines.hf import HFEngine
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.hf import HFPolicy

VOCABULARY = ["<eos>", *"abcdefghijklmnopqrs"]
IDS = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ROPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**IDS, **ROPE),
    "gpt2": GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    "mistral": MistralConfig(**IDS, **ROPE, sliding_window=5),
}


class _PlanOf:
    run = RunOptions()


@pytest.fixture
def policy() -> HFPolicy:
    return HFPolicy(HFPolicyConfig(), Context(cast(Plan, _PlanOf())))


@pytest.fixture
def load(tmp_path: Path, policy: HFPolicy) -> Callable[..., tuple[Any, LoadSpec]]:
    """(module, spec) of a family. `sharpness` scales the logits: random models are nearly uniform."""

    def make(family: str = "llama", stops: Any = 0, sharpness: float = 8.0, **more: Any) -> tuple[Any, LoadSpec]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(sharpness)
        place = tmp_path / family
        model.save_pretrained(place)
        inner = Tokenizer(tokenizer_models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<eos>"))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        inner.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>").save_pretrained(place)
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        spec = LoadSpec("policy", str(place), "lm", True, "keep", "cpu", **more)
        return policy.load(spec), spec

    return make


@pytest.fixture
def attach(policy: HFPolicy) -> Callable[..., HFEngine]:
    def make(loaded: tuple[Any, LoadSpec], **options: Any) -> HFEngine:
        engine = HFEngine(HFEngineConfig(**options), Context(cast(Plan, None), seed=7))
        engine.attach(loaded[0], policy, loaded[1])
        return engine

    return make


@pytest.fixture
def ask() -> Callable[..., list[Sample]]:
    """Requests for prompts of the given lengths, the i-th with seed i."""

    def make(*lengths: int, count: int = 1, **more: Any) -> list[Sample]:
        draw = torch.Generator().manual_seed(5)
        prompts = [torch.randint(1, len(VOCABULARY), (n,), generator=draw) for n in lengths]
        return [Sample(Prompt(tokens, None, i), count=count, **{"seed": i, **more}) for i, tokens in enumerate(prompts)]

    return make


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """Starts servers of a fake vLLM."""
    servers: list[Running] = []

    def make(**arguments: Any) -> Running:
        servers.append(Running(**arguments))
        return servers[-1]

    yield make
    for server in servers:
        server.service.stop()
