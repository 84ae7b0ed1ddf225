"""What vLLM is given is what the trainer computes with: adapters merged as PEFT merges them, or apart as PEFT saves
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rlhf_plugins.engines.vllm import weights

IDS = {"vocab_size": 24, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
CONFIGS = {
    "llama": LlamaConfig(**IDS, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True),
    "gpt2": GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
}  # fmt: skip


def adapted(family: str = "llama", **options: Any) -> Any:
    """A PEFT model whose adapters do something."""
    torch.manual_seed(0)
    gpt2 = family == "gpt2"
    targets = ["c_attn", "c_fc"] if gpt2 else ["q_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_config(CONFIGS[family]),
        LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=gpt2, **options),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def stream(module: Any, asked: list[str] | None = None) -> Callable[..., Iterator[tuple[str, Tensor]]]:
    def run(only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in module.state_dict().items():
            if only is None or only(name):
                if asked is not None:
                    asked.append(name)
                yield name, tensor

    return run


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"use_rslora": True}), ("llama", {"use_dora": True}), ("gpt2", {})],
)
def test_merged_as_peft_merges(family: str, options: dict[str, Any]) -> None:
    model = adapted(family, **options)
    found = dict(weights.plain(model, stream(model))())
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        right = model(tokens).logits
    plain: Any = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    assert set(found) == set(plain.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain.load_state_dict(found)
    with torch.no_grad():
        # float32 sums of 16 or 64 products in another order; adapters move logits by far more
        assert torch.allclose(plain(tokens).logits, right, atol=1e-5)
        with model.disable_adapter():
            assert (model(tokens).logits - right).abs().max() > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_by_hand() -> None:
    """W + (alpha / r) B A, one matrix."""
    model = adapted()
    state = model.state_dict()
    place = "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = state[f"{place}.lora_A.default.weight"], state[f"{place}.lora_B.default.weight"]
    expected = state[f"{place}.base_layer.weight"] + 5 / 3 * b @ a
    found = dict(weights.plain(model, stream(model))())["model.layers.1.self_attn.q_proj.weight"]
    # rounding of sums of 3 products of order 0.1
    assert torch.allclose(found, expected, atol=1e-6)


def test_one_layer_is_held_at_a_time() -> None:
    """A tensor that is asked for waits for its own layer's others at most."""
    model = adapted()
    asked: list[str] = []
    run = weights.plain(model, stream(model, asked))()
    ahead = [len(asked) - given for given, _ in enumerate(run, start=1)]
    # of an adapted layer with a bias: weight, bias, A, B, and the one after it, of which two have been given
    assert max(ahead) <= 3 + 2 * 4  # A and B of each of the four adapted layers are never given


def test_rounded_to_the_bases_own_type() -> None:
    model = adapted().to(torch.bfloat16)
    found = dict(weights.plain(model, stream(model))())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    state = model.state_dict()
    a, b = state[f"{place}.lora_A.default.weight"], state[f"{place}.lora_B.default.weight"]
    exact = state[f"{place}.base_layer.weight"].float() + 5 / 3 * b.float() @ a.float()
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], exact.to(torch.bfloat16))


def test_a_model_without_adapters_is_as_it_is() -> None:
    model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    found = dict(weights.plain(model, stream(model))())
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())


def test_the_base_is_streamed_without_its_adapters() -> None:
    model = adapted()
    asked: list[str] = []
    found = dict(weights.base(model, stream(model, asked))())
    assert not [name for name in asked if "lora_" in name]
    with model.disable_adapter():
        plain = model.get_base_model().state_dict()
    assert torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.base_layer.weight"]
    )


def test_adapters_are_as_peft_saves_them_and_nothing_else_is_gathered() -> None:
    model = adapted()
    model.add_adapter("value", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    asked: list[str] = []
    found = weights.adapter(model, stream(model, asked))
    expected = get_peft_model_state_dict(model, adapter_name="default")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not [name for name in asked if "lora_" not in name or ".value." in name]
    config = weights.adapter_config(model)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["down_proj", "q_proj"])
    assert LoraConfig(**{k: v for k, v in config.items() if k in ("r", "lora_alpha", "target_modules", "use_rslora")})


def test_packed_weights_without_an_adapter_are_unpacked_too() -> None:
    """Only q_proj is adapted; others of a 4-bit base come plain too, and nothing of their packing comes along."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    model = adapted()
    plain = {name: tensor.shape for name, tensor in weights.plain(model, stream(model))()}
    state: dict[str, Tensor] = dict(model.state_dict())
    place = "base_model.model.model.layers.0.self_attn.k_proj"
    packed = _linear4bit(state[f"{place}.weight"])
    model.set_submodule(place, packed)
    found = dict(weights.plain(model, stream(model))())
    assert {name: tensor.shape for name, tensor in found.items() if not name.endswith("0.self_attn.k_proj.bias")} == {
        name: shape for name, shape in plain.items() if not name.endswith("0.self_attn.k_proj.bias")
    }
    right = state[f"{place}.weight"]
    # nf4's widest step is .304 of its block's largest: rounding is by half of that at most
    assert (found["model.layers.0.self_attn.k_proj.weight"] - right).abs().max() < 0.16 * right.abs().max()


def _linear4bit(weight: Tensor) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4",
                              compute_dtype=torch.float32)  # fmt: skip
    layer.weight = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", requires_grad=False)
    layer = layer.to("cpu")
    layer(torch.randn(2, weight.shape[1]))  # packs it, where that hasn't been done
    return layer


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_packed_weights_are_unpacked(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    torch.manual_seed(0)
    right = torch.randn(64, 64)
    if kind == "4bit":
        layer = _linear4bit(right)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(right.clone(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        layer(torch.randn(2, 64))  # packs it, where that hasn't been done
    found = weights.unpacked(layer, "weight", layer.weight.data)
    # 16 steps over about 6 standard deviations, or 255 of them
    assert found.shape == (64, 64)
    assert (found - right).abs().max() < (0.6 if kind == "4bit" else 0.04)
