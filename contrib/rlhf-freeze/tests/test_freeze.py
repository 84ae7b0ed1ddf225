"""What is trained of a model, and that a plan counts the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from rlhf.api import Architecture, Context, LoadSpec, ModuleMemory, Plan, RequestError, Weight
from rlhf_freeze import FreezeConfig, fits, kept, trained_part
from rlhf_freeze.strategy import Freeze

SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 20}
LLAMA = LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, **SMALL)
TIED = LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
GPT2 = GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=20, n_positions=16)


def spec(head: Any = "lm") -> LoadSpec:
    return LoadSpec("policy", "a-model", head, True, "keep", "cpu")


def frozen(config: PretrainedConfig, kind: Any = "lm", **options: Any) -> nn.Module:
    kinds = {"lm": AutoModelForCausalLM, "scalar": AutoModelForSequenceClassification}
    module: nn.Module = kinds[kind].from_config(config)
    return Freeze(FreezeConfig(**options), Context(plan=cast(Plan, None))).adapt(module, spec(kind))


def trained(module: nn.Module) -> set[str]:
    """The parts that have a trained parameter, layers by number."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {".".join(name.split(".")[1:3]) if ".layers." in name or ".h." in name else name for name in names}


@pytest.mark.parametrize(
    ("config", "kind", "options", "expected"),
    [
        (LLAMA, "lm", {"layers": 1}, {"layers.2", "model.norm.weight"}),
        (LLAMA, "lm", {"layers": 2}, {"layers.1", "layers.2", "model.norm.weight"}),
        (LLAMA, "lm", {"layers": 1, "head": True}, {"layers.2", "model.norm.weight", "lm_head.weight"}),
        (TIED, "lm", {"layers": 1}, {"layers.2", "model.norm.weight"}),
        (TIED, "lm", {"layers": 1, "head": True}, {"layers.2", "model.norm.weight", "model.embed_tokens.weight"}),
        (LLAMA, "scalar", {"layers": 1}, {"layers.2", "model.norm.weight", "score.weight"}),
        (GPT2, "lm", {"layers": 1}, {"h.2", "transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
)
def test_what_is_trained(config: PretrainedConfig, kind: str, options: dict[str, Any], expected: set[str]) -> None:
    assert trained(frozen(config, kind, **options)) == expected


def test_gradients_are_those_of_the_whole_model_where_there_are_any() -> None:
    torch.manual_seed(0)
    module, ids = frozen(LLAMA, layers=1), torch.tensor([[1, 2, 3]])
    module(input_ids=ids, labels=ids).loss.backward()
    some = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.requires_grad_(True)
    module(input_ids=ids, labels=ids).loss.backward()
    every = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(some) == 9 + 1 and len(every) == 3 * 9 + 3  # nine weights a layer, and the norm, embedding and head
    assert all(torch.equal(some[name], every[name]) for name in some)


def test_nothing_to_freeze_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--mem\.freeze\.layers 3: a-model has 3 layers"):
        frozen(LLAMA, layers=3)


def test_a_weight_is_counted_by_layer() -> None:
    def count(weight: Weight, **options: Any) -> int:
        return trained_part(weight, 3, FreezeConfig(**options))

    assert count(Weight(name="q_proj", shape=(8, 8), kind="linear", count=3), layers=2) == 2
    assert count(Weight(name="norm", shape=(8,), kind="vector", count=7), layers=2) == 5  # two a layer, and the last
    assert count(Weight(name="score", shape=(1, 8), kind="score"), layers=1) == 1
    embedding = Weight(name="embed_tokens", shape=(20, 8), kind="embedding")
    head = Weight(name="lm_head", shape=(20, 8), kind="head")
    assert [count(embedding, layers=1), count(head, layers=1)] == [0, 0]
    assert [count(embedding, layers=1, head=True), count(head, layers=1, head=True)] == [1, 1]
    positions = Weight(name="positions", shape=(16, 8), kind="embedding")
    assert count(positions, layers=1, head=True) == 0


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["own head", "tied head"])
def test_a_plan_counts_what_is_trained(config: LlamaConfig, head: bool) -> None:
    tied = bool(config.tie_word_embeddings)
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    weights = [Weight(name=name, shape=shape, kind="linear", count=3, trained=True) for name, shape in shapes.items()]
    weights += [
        Weight(name="embed_tokens", shape=(20, 8), kind="embedding", trained=True),
        Weight(name="norm", shape=(8,), kind="vector", count=7, trained=True),
    ]
    weights += [] if tied else [Weight(name="lm_head", shape=(20, 8), kind="head", trained=True)]
    architecture = cast(Architecture, SimpleNamespace(layers=3, tied=tied))
    whole = ModuleMemory(role="policy", trainable=True, scalar=False, architecture=architecture, weights=tuple(weights))
    component: Any = SimpleNamespace(config=FreezeConfig(layers=2, head=head))
    found = kept(whole, cast(Plan, None), component)
    module = frozen(config, layers=2, head=head)
    assert sum(w.numbers for w in found.trained) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(w.numbers for w in found.weights) == sum(p.numel() for p in module.parameters())


def test_a_role_that_is_not_trained_or_has_no_more_layers_is_refused_by_the_plan() -> None:
    component: Any = SimpleNamespace(name="freeze", key="freeze", config=FreezeConfig(layers=3))

    def role(name: str, trainable: bool, layers: int) -> Any:
        model = SimpleNamespace(known=True, path="a-model", get=lambda *keys: layers)
        return SimpleNamespace(
            name=name, chooses=True, mem=(component,), model=model, role=SimpleNamespace(trainable=trainable)
        )

    plan: Any = SimpleNamespace(roles=(role("policy", True, 3), role("reference", False, 9), role("value", True, 4)))
    found = [str(problem) for problem in fits(plan, component)]
    assert len(found) == 2
    assert "--mem.freeze.layers 3: a-model has 3 layers" in found[0]
    assert "--mem reference=freeze: the role reference isn't trained" in found[1]
