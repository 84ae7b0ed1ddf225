"""Counts from config.json against transformers' own models on the meta device."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf.facts import ModelFacts
from rlhf.planning.architecture import FAMILIES, Uncountable, architecture

SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000,
    "intermediate_size": 704, "pad_token_id": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000},
    "opt": {
        "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 1000, "ffn_dim": 704,
        "word_embed_proj_dim": 256,
    },
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {**SMALL, "num_experts": 8, "moe_intermediate_size": 96, "num_experts_per_tok": 2},
}  # fmt: skip
VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 64}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 64}),
    ("gpt2", {"n_inner": 300}),
    ("starcoder2", {"use_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True, "attention_bias": False}),
]


def pair(model_type: str, **more: Any) -> tuple[torch.nn.Module, ModelFacts]:
    """(transformers' model without storage, the facts its config.json tells)."""
    config = CONFIG_MAPPING[model_type](**{**OWN.get(model_type, SMALL), **more})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, ModelFacts("a-model", json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize(("model_type", "more"), [*((kind, {}) for kind in FAMILIES), *VARIANTS])
def test_parameters_are_exact(model_type: str, more: dict[str, Any]) -> None:
    model, facts = pair(model_type, **more)
    assert architecture(facts).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", [kind for kind in FAMILIES if not FAMILIES[kind].experts])
def test_linear_weights_have_their_real_shapes_and_names(model_type: str) -> None:
    """What is adapted and quantised goes by them."""
    model, facts = pair(model_type)
    head = model.get_output_embeddings()
    real: dict[tuple[str, int], int] = {}
    for name, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if weight is not None and weight.ndim == 2 and not isinstance(part, torch.nn.Embedding) and part is not head:
            key = (name.rpartition(".")[2], weight.numel())
            real[key] = real.get(key, 0) + 1
    told: dict[tuple[str, int], int] = {}
    for weight in architecture(facts).weights:
        if weight.kind == "linear":
            key = (weight.name, weight.numel)
            told[key] = told.get(key, 0) + weight.count
    assert told == real


def test_smollm2_by_hand() -> None:
    config = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    found = architecture(ModelFacts("a-model", config))
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576
    assert found.parameters == 49152 * 576 + 30 * layer + 576 == 134_515_008
    assert (found.head_size, found.key_heads, found.windows) == (64, 3, (None,) * 30)


def test_experts_count_whole_and_are_read_in_part() -> None:
    _, facts = pair("qwen3_moe")
    found = architecture(facts)
    experts = [weight for weight in found.weights if len(weight.shape) == 3]
    assert [math.prod(weight.shape) for weight in experts] == [8 * 192 * 256, 8 * 256 * 96]
    assert {weight.share for weight in experts} == {2 / 8}
    assert found.inner == 2 * 96  # of one token


def test_windows_are_told_by_layer() -> None:
    _, facts = pair("gemma3_text", sliding_window=64)
    assert set(architecture(facts).windows) <= {64, None}
    assert architecture(ModelFacts("m", {**facts.config, "sliding_window": None})).windows == (None,) * 3  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "is not here yet"),
        ({"model_type": "mamba"}, "'mamba' can't be counted; known: llama"),
        ({}, "'' can't be counted"),
        ({"model_type": "llama", "hidden_size": 8}, "no usable num_hidden_layers"),
        ({"model_type": "llama", "hidden_size": "8"}, "no usable hidden_size"),
    ],
)
def test_what_cant_be_counted_is_told(config: dict[str, Any] | None, why: str) -> None:
    with pytest.raises(Uncountable, match=r"^org/model: ") as caught:
        architecture(ModelFacts("org/model", config))
    assert why in str(caught.value)
