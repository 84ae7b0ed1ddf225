"""Tiny random models with a tokenizer of characters, in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf.interfaces import Context, LoadSpec
from rlhf.plan import Plan
from rlhf.recipe import RunOptions
from rlhf.sequences import Sequences
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.hf import HFPolicy

VOCABULARY = ["<eos>", "<unk>", "<s>", "<user>", "<bot>", "<end>", *"abcdefghijklmnopqrstuvwxyz +=?.\n:QA"]
IDS = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ROPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**IDS, **ROPE),
    "llama-tied": LlamaConfig(**IDS, **ROPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**IDS, **ROPE),
    "gpt2": GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    # what others do to their logits or windows
    "gemma2": Gemma2Config(**IDS, **ROPE, final_logit_softcapping=0.05, attn_logit_softcapping=None, sliding_window=4),
    "cohere": CohereConfig(**IDS, **{k: v for k, v in ROPE.items() if k != "head_dim"}, logit_scale=4.0),
    "granite": GraniteConfig(**IDS, **{k: v for k, v in ROPE.items() if k != "head_dim"}, logits_scaling=0.25),
    "mistral": MistralConfig(**IDS, **ROPE, sliding_window=12),
}


def tokenizer(bos: bool = False) -> Any:
    """A token a character; `<eos>` pads too."""
    inner = Tokenizer(tokenizer_models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        **({"bos_token": "<s>"} if bos else {}),
        additional_special_tokens=["<user>", "<bot>", "<end>"],
    )


def build(family: str, head: str = "lm") -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict())
    if head == "scalar":
        config.num_labels = 1
    model = auto.from_config(config).eval()
    with torch.no_grad():  # at their usual start, attention and biases hardly show in the outputs
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.fixture
def model() -> Callable[..., Any]:
    """A random model of a family, in memory."""
    return build


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    def save(family: str, head: str = "lm", bos: bool = False) -> str:
        place = tmp_path / f"{family}-{head}"
        build(family, head).save_pretrained(place)
        tokenizer(bos).save_pretrained(place)
        return str(place)

    return save


class _PlanOf:
    run = RunOptions()


@pytest.fixture
def policy() -> Callable[..., HFPolicy]:
    return lambda **options: HFPolicy(HFPolicyConfig(**options), Context(cast(Plan, _PlanOf())))


@pytest.fixture
def spec() -> Callable[..., LoadSpec]:
    def make(model: str, head: Any = "lm", **more: Any) -> LoadSpec:
        return LoadSpec(**{
            "role": "policy", "model": model, "head": head, "trainable": True, "head_init": "keep", "device": "cpu",
            **more,
        })  # fmt: skip

    return make


@pytest.fixture
def ragged() -> Sequences:
    """Five responses of 1 to 9 tokens to two prompts of 7 and 3, some with `<eos>` in them, which is also the pad."""
    draw = torch.Generator().manual_seed(1)

    def tokens(n: int, end: bool = False) -> torch.Tensor:
        ids = torch.randint(1, len(VOCABULARY), (n,), generator=draw)
        return torch.cat([ids[:-1], torch.zeros(1, dtype=torch.long)]) if end else ids

    return Sequences.of(
        [tokens(7), tokens(3)],
        [tokens(4, end=True), tokens(9), tokens(1, end=True), tokens(6), tokens(2, end=True)],
        prompt_of=[0, 1, 0, 0, 1],
    )
