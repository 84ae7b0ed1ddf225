"""What a model computes, counted from its config by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import attrs
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from rlhf.api import AttentionShape, Context, LoadSpec, ModelShape, Plan
from rlhf_plugins.memory import LoraConfig
from rlhf_plugins.memory.lora import Lora
from rlhf_plugins.policies.hf import HFPolicy
from rlhf_plugins.policies.shape import shape_of

V, D, F, LAYERS, HEADS, KV, HEAD = 41, 32, 48, 2, 4, 2, 8
LAYER = D * HEADS * HEAD + 2 * D * KV * HEAD + HEADS * HEAD * D + 3 * D * F  # q, k and v, o, the three of the MLP
ALL = (AttentionShape(width=LAYERS * HEADS * HEAD, cached=LAYERS * 2 * KV * HEAD),)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_a_head_is_counted_once_tied_or_not_and_embeddings_never(family: str, model: Callable[..., Any]) -> None:
    assert shape_of(model(family)) == ModelShape(
        trunk=LAYERS * LAYER, trunk_trained=LAYERS * LAYER, head=V * D, head_trained=V * D, attention=ALL,
        dtype="float32", weight_bytes=4.0 * (LAYERS * LAYER + V * D),
    )  # fmt: skip


def test_gpt2_keeps_its_matrices_otherwise(model: Callable[..., Any]) -> None:
    found = shape_of(model("gpt2"))
    assert found.trunk == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert found.head == V * 32
    assert found.attention == (AttentionShape(width=64, cached=128),)


def test_windows_are_told(model: Callable[..., Any]) -> None:
    assert shape_of(model("mistral")).attention == (attrs.evolve(ALL[0], window=12),)
    half = AttentionShape(width=HEADS * HEAD, cached=2 * KV * HEAD)
    assert set(shape_of(model("gemma2")).attention) == {half, attrs.evolve(half, window=4)}  # every other layer


def test_a_token_goes_through_some_of_the_experts() -> None:
    config = MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, num_local_experts=8, num_experts_per_tok=2, head_dim=HEAD,
    )  # fmt: skip
    found = shape_of(AutoModelForCausalLM.from_config(config))
    attention = D * HEADS * HEAD + 2 * D * KV * HEAD + HEADS * HEAD * D
    assert found.trunk == LAYERS * (attention + D * 8 + 2 * 3 * D * F)  # a router, two experts of the eight


def test_adapters_are_what_is_trained(
    folder: Callable[..., str], policy: Callable[..., HFPolicy], spec: Callable[..., LoadSpec]
) -> None:
    how = spec(folder("llama"))
    module = policy().load(how)
    adapted = Lora(LoraConfig(rank=3, targets=("q_proj", "v_proj")), Context(cast(Plan, None))).adapt(module, how)
    found = policy().shape(adapted)
    adapters = LAYERS * 3 * (D + HEADS * HEAD + D + KV * HEAD)
    assert (found.trunk, found.trunk_trained) == (LAYERS * LAYER + adapters, adapters)
    assert (found.head, found.head_trained) == (V * D, 0)


def test_a_scalar_model_has_no_vocabulary_head(
    folder: Callable[..., str], policy: Callable[..., HFPolicy], spec: Callable[..., LoadSpec]
) -> None:
    module = policy().load(spec(folder("llama", "scalar"), "scalar", trainable=False))
    found = policy().shape(module)
    assert (found.trunk, found.trunk_trained, found.head) == (LAYERS * LAYER, 0, 0)


def test_products_are_of_the_type_they_are_computed_in(
    folder: Callable[..., str], policy: Callable[..., HFPolicy], spec: Callable[..., LoadSpec]
) -> None:
    autocast = policy().load(spec(folder("llama"), compute=torch.bfloat16))
    kept = policy().load(spec(folder("llama"), weights=torch.bfloat16))
    for module in (autocast, kept):
        found = policy().shape(module)
        assert (found.dtype, found.weight_bytes) == ("bfloat16", 2.0 * (LAYERS * LAYER + V * D))


def test_the_models_are_those_counted_here(model: Callable[..., Any]) -> None:
    config = model("llama").config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (V, D, F)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (LAYERS, KV, HEAD)
