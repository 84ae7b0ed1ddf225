"""Exported models: plain folders that compute what the adapters and quantised weights did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
)

from rlhf.interfaces import Context, HeadRequest, LoadSpec, MemoryStrategy
from rlhf.plan import Plan
from rlhf.recipe import RunOptions
from rlhf.sequences import Sequences
from rlhf_plugins.memory import EightBitConfig, FourBitConfig, LoraConfig
from rlhf_plugins.memory.lora import Lora
from rlhf_plugins.memory.quantised import EightBit, FourBit
from rlhf_plugins.policies import HFPolicyConfig
from rlhf_plugins.policies.hf import HFPolicy

SHAPE: dict[str, Any] = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        **SHAPE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, attention_bias=True,
    ),
    "gpt2": GPT2Config(**SHAPE, n_embd=64, n_layer=2, n_head=2, n_positions=64),
}  # fmt: skip
SEQUENCES = Sequences.of([torch.tensor([5, 6, 7])], [torch.tensor([8, 9]), torch.tensor([1, 2])], prompt_of=[0, 0])
CONTEXT = Context(cast(Plan, None))


class _PlanOf:
    run = RunOptions()


class Policy(HFPolicy):
    """These models have no tokenizer; what saves one is tested elsewhere."""

    def save(self, module: nn.Module, folder: Path, spec: LoadSpec) -> None:
        cast(Any, module).save_pretrained(folder)


@pytest.fixture
def policy() -> Policy:
    return Policy(HFPolicyConfig(), Context(cast(Plan, _PlanOf())))


def base(folder: Path, family: str, head: str, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    config = CONFIGS[family].__class__.from_dict({**CONFIGS[family].to_dict(), "num_labels": 1})
    model = auto.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # they start at zero, and would not be missed
    model.save_pretrained(folder)
    return str(folder)


def strategies(quantised: str, **lora: Any) -> list[MemoryStrategy]:
    found: list[MemoryStrategy] = [Lora(LoraConfig(targets=("all-linear",), **lora), CONTEXT)]
    if quantised == "4bit":
        found.insert(0, FourBit(FourBitConfig(), CONTEXT))
    if quantised == "8bit":
        found.insert(0, EightBit(EightBitConfig(), CONTEXT))
    return found


def trained(policy: Policy, spec: LoadSpec, acting: list[MemoryStrategy], folder: Path) -> tuple[LoadSpec, Tensor]:
    """Save adapters that do something; returns (how they were loaded, what they compute)."""
    for strategy in acting:
        spec = strategy.load(spec)
    module = policy.load(spec)
    for strategy in acting:
        module = strategy.adapt(module, spec)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    policy.save(module, folder, spec)
    return attrs.evolve(spec, model=str(folder), trainable=False), computed(policy, module, spec.head)


def computed(policy: Policy, module: nn.Module, head: Any) -> Tensor:
    with torch.no_grad():
        (scores,) = policy.score(module, SEQUENCES, [HeadRequest("policy", head)])
    return scores.logp if head == "lm" else scores.score


def plain(folder: Path, head: Any) -> LoadSpec:
    return LoadSpec("policy", str(folder), head, False, "keep", "cpu")


CASES = [("", {}), ("", {"dora": True}), ("", {"rslora": True}), ("4bit", {}), ("8bit", {})]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("quantised", "lora"), CASES)
def test_the_plain_folder_computes_what_the_adapters_did(
    quantised: str, lora: dict[str, Any], family: str, head: Any, policy: Policy, tmp_path: Path
) -> None:
    spec = LoadSpec("policy", base(tmp_path / "base", family, head), head, True, "keep", "cpu", seed=5)
    spec, expected = trained(policy, spec, strategies(quantised, **lora), tmp_path / "adapter")
    told = HFPolicy.export(spec, tmp_path / "out", None)
    assert told["merged"] and told["unpacked"] == bool(quantised) and told["dtype"] == "float32"
    found = computed(policy, policy.load(plain(tmp_path / "out", head)), head)
    # float32: (W + BA) x for W x + BA x, sums of at most 256 products of order 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in files and not any("adapter" in name for name in files)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert names.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert told["weights"] == sum(p.numel() for p in names.values()) and told["bytes"] == 4 * told["weights"]
    without = computed(policy, policy.load(plain(tmp_path / "base", head)), head)
    assert (without - expected).abs().max() > 0.01  # the adapters do something


def test_quantised_weights_are_merged_as_they_were_and_not_as_they_had_been(policy: Policy, tmp_path: Path) -> None:
    spec = LoadSpec("policy", base(tmp_path / "base", "llama", "lm"), "lm", True, "keep", "cpu", seed=5)
    spec, expected = trained(policy, spec, strategies("4bit"), tmp_path / "adapter")
    HFPolicy.export(plain(tmp_path / "adapter", "lm"), tmp_path / "other", None)
    on_the_original = computed(policy, policy.load(plain(tmp_path / "other", "lm")), "lm")
    assert (on_the_original - expected).abs().max() > 1e-3  # what rounding to 4 bits changes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_precision_is_the_bases_or_the_one_asked_for(
    stored: torch.dtype, asked: torch.dtype | None, policy: Policy, tmp_path: Path
) -> None:
    spec = LoadSpec("policy", base(tmp_path / "base", "llama", "lm", stored), "lm", True, "keep", "cpu", seed=5)
    spec, _ = trained(policy, spec, strategies(""), tmp_path / "adapter")
    told = HFPolicy.export(spec, tmp_path / "out", asked)
    wanted = asked or stored
    assert {p.dtype for p in load_file(tmp_path / "out" / "model.safetensors").values()} == {wanted}
    name = str(wanted).removeprefix("torch.")
    assert told["dtype"] == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_a_whole_model_is_converted(policy: Policy, tmp_path: Path) -> None:
    path = base(tmp_path / "base", "llama", "lm")
    told = HFPolicy.export(plain(Path(path), "lm"), tmp_path / "out", torch.bfloat16)
    assert not told["merged"] and not told["unpacked"]
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
