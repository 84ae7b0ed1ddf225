"""Quantised weights: the bytes they take, that products and gradients are those of the weights they stand for, and who
may have them."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from needs import needs
from rlhf.cli import main
from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Gpu, Machine
from rlhf.interfaces import HeadRequest, LoadSpec, MemoryStrategy
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry, load
from rlhf.sequences import Sequences
from rlhf_plugins.policies.hf import HFPolicy

Folder = Callable[..., str]
Strategies = Callable[..., list[MemoryStrategy]]
Prepared = Callable[..., tuple[nn.Module, LoadSpec]]
Typed = Callable[..., Recipe]

ROPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**ROPE),
    "qwen2": Qwen2Config(**ROPE),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=64, n_layer=4, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0
    ),
}
MATRICES = {
    "llama": [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)],
    "qwen2": [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)],
    "gpt2": [(192, 64), (64, 64), (256, 64), (64, 256)],  # kept transposed in the checkpoint
}
"""Of one layer: [out, in]."""
LAYERS = 4
SEQUENCES = Sequences.of(
    [torch.tensor([5, 6, 7]), torch.tensor([9, 3])],
    [torch.tensor([8, 9]), torch.tensor([1, 2, 60]), torch.tensor([4])],
    prompt_of=[0, 0, 1],
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """As everywhere, but of models whose rows are whole blocks."""

    def save(family: str, head: str = "lm", **changes: int) -> str:
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        labels = {"num_labels": 1} if head == "scalar" else {}
        config = CONFIGS[family].__class__.from_dict({**CONFIGS[family].to_dict(), **labels, **changes})
        place = tmp_path / f"{family}-{head}"
        auto.from_config(config).save_pretrained(place)
        return str(place)

    return save


def quantised(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Linear4bit | Linear8bitLt)}


def bytes_of(part: Any) -> int:
    """Of a quantised weight with all that is needed to unpack it, tables left out, which are alike for all."""
    weight = part.weight
    if isinstance(part, Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else part.state.SCB
        return int(weight.nbytes + scales.nbytes)
    state = weight.quant_state
    return int(weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0))


def expected_bytes(name: str, rows: int, columns: int) -> int:
    weights = rows * columns
    blocks = -(-weights // 64)
    return {
        "4bit": weights // 2 + blocks + 4 * -(-blocks // 256),  # magnitudes of 8 bits, a float32 for 256 of them
        "4bit single": weights // 2 + 4 * blocks,
        "8bit": weights + 4 * rows,
    }[name]


def unpacked(part: Any) -> torch.Tensor:
    """The matrix that a quantised weight stands for, by the papers' formulas: float32 [out, in]."""
    weight = part.weight
    if isinstance(part, Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else part.state.SCB
        return weight.data.float() * (scales / 127)[:, None]
    state = weight.quant_state
    packed = weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()  # the first of two in the high half
    magnitudes = state.absmax
    if state.nested:
        of_blocks = state.state2.absmax.repeat_interleave(256)[: len(magnitudes)]
        magnitudes = state.state2.code[magnitudes.long()] * of_blocks + state.offset
    values = state.code[codes] * magnitudes.repeat_interleave(64)[: len(codes)]
    return cast(torch.Tensor, values.view(state.shape))


def plain_twin(module: nn.Module) -> nn.Module:
    """The same module with ordinary linear layers that hold the unpacked weights."""
    twin = copy.deepcopy(module)
    for name, part in quantised(twin).items():
        linear = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
        linear.weight = nn.Parameter(unpacked(part), requires_grad=False)
        if part.bias is not None:
            linear.bias = nn.Parameter(part.bias.detach().clone(), requires_grad=False)
        twin.set_submodule(name, linear)
    return twin


def disturb(module: nn.Module) -> None:
    """Give B a value: at its zero the adapters do nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(params=["4bit", "4bit single", "8bit"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def acting(strategies: Strategies, kind: str) -> Callable[..., list[MemoryStrategy]]:
    """The quantisation of this test, with other strategies."""

    def make(*names: str, **options: dict[str, Any]) -> list[MemoryStrategy]:
        chosen = {"4bit": {"4bit": {}}, "4bit single": {"4bit": {"double_quant": False}}, "8bit": {"8bit": {}}}[kind]
        return strategies(*names, **chosen, **options)

    return make


# What they are


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_are_exact_and_the_rest_keeps_its_precision(
    family: str, kind: str, head: Any, precision: str, folder: Folder, acting: Strategies, prepared: Prepared
) -> None:
    module, spec = prepared(folder(family, head), acting(precision), head, trainable=False)
    parts = quantised(module)
    assert len(parts) == LAYERS * len(MATRICES[family])
    found = [((part.out_features, part.in_features), bytes_of(part)) for part in parts.values()]
    assert found == [(shape, expected_bytes(kind, *shape)) for shape in MATRICES[family] * LAYERS]
    assert {part.weight.dtype for part in parts.values()} == {torch.int8 if kind == "8bit" else torch.uint8}
    wanted = torch.float32 if precision == "fp32" else torch.bfloat16
    assert spec.weights == wanted
    packed = {f"{name}.weight" for name in parts}
    rest = {name: p.dtype for name, p in module.named_parameters() if name not in packed}
    assert rest.pop("score.weight", torch.float32) == torch.float32  # a score's own precision
    assert set(rest.values()) == {wanted}
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert embedding in rest and (head == "scalar" or family == "gpt2" or "lm_head.weight" in rest)


def test_nf4_is_near_what_it_was_made_from(folder: Folder, strategies: Strategies, prepared: Prepared) -> None:
    """Of normal weights, the quantiles' cells are at most .3 of a block's largest magnitude wide (between the outer
    two), so no weight is off by more than .16 of it, 8-bit magnitudes included."""
    path = folder("llama")
    original = load_file(Path(path) / "model.safetensors")
    module, _ = prepared(path, strategies("fp32", "4bit"), trainable=False)
    for name, part in quantised(module).items():
        weight = original[f"{name}.weight"].flatten()
        off = (unpacked(part).flatten() - weight).abs().view(-1, 64)
        assert (off <= 0.16 * weight.view(-1, 64).abs().amax(1, keepdim=True)).all()
        assert off.max() > 0  # it is quantised


def test_fp4_is_another_table(folder: Folder, strategies: Strategies, prepared: Prepared) -> None:
    module, _ = prepared(folder("llama"), strategies("fp32", **{"4bit": {"quant_type": "fp4"}}), trainable=False)
    part = next(iter(quantised(module).values()))
    magnitudes = (part.weight.quant_state.code.abs() * 12).unique()
    # a sign, two bits of exponent, one of mantissa, scaled to 1
    torch.testing.assert_close(magnitudes, torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]), atol=1e-4, rtol=0)


# What they compute


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_scores_and_gradients_are_those_of_the_unpacked_weights(
    family: str, head: Any, folder: Folder, acting: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    """After forwards without gradient, as rollouts and experience are before a loss; the modules' mode is evaluation.

    Where a CPU has AVX512-BF16, bitsandbytes left to itself fails this: it repacks the weights at the first forward.
    """
    wrapped = ("checkpointing",) if family == "llama" else ()  # with and without
    module, _ = prepared(folder(family, head), acting("fp32", *wrapped, lora={"targets": ("all-linear",)}), head)
    disturb(module)
    twin = plain_twin(module)
    request = [HeadRequest("policy", head)]
    found = []
    for one in (module, twin):
        with torch.no_grad():
            policy.score(one, SEQUENCES, request)
        (scores,) = policy.score(one, SEQUENCES, request)
        values = scores.logp if head == "lm" else scores.score
        (values * torch.linspace(1, 2, len(values))).sum().backward()
        grads = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        found.append((values.detach(), grads))
    (ours, our_grads), (theirs, their_grads) = found
    # float32, sums of at most 256 products of order 1, in another order
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(our_grads) == 2 * LAYERS * len(MATRICES[family]) + (head == "scalar")
    for name, grad in our_grads.items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(
            grad, their_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_bf16_scores_are_those_of_the_unpacked_weights_to_its_resolution(
    kind: str, folder: Folder, acting: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    module, spec = prepared(folder("llama"), acting("bf16", "lora"))
    assert (spec.weights, spec.compute) == (torch.bfloat16, torch.bfloat16)
    disturb(module)
    twin = plain_twin(module)
    request = [HeadRequest("policy", "lm")]
    with torch.no_grad():
        (ours,), (theirs,) = policy.score(module, SEQUENCES, request), policy.score(twin, SEQUENCES, request)
    # logits of order 1 after four layers of products rounded to 8 bits each: a few times 2^-8
    torch.testing.assert_close(ours.logp, theirs.logp, atol=0.02, rtol=0)


def test_adapters_off_is_the_quantised_base(
    folder: Folder, acting: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    path = folder("llama")
    chosen = acting("fp32", "lora")
    module, _ = prepared(path, chosen)
    base, _ = prepared(path, acting("fp32"), trainable=False)
    disturb(module)
    request = [HeadRequest("policy", "lm")]
    with torch.no_grad():
        (expected,) = policy.score(base, SEQUENCES, request)
        (adapted,) = policy.score(module, SEQUENCES, request)
        off = next(context for s in chosen if (context := s.adapters_off(module)) is not None)
        with off:
            (found,) = policy.score(module, SEQUENCES, request)
    assert torch.equal(found.logp, expected.logp)
    assert not torch.allclose(adapted.logp, expected.logp, atol=1e-3)


def test_floors_know_how_little_is_read(
    kind: str, folder: Folder, acting: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    plain, _ = prepared(folder("llama"), acting("fp32")[:1], trainable=False)
    module, _ = prepared(folder("llama"), acting("fp32"), trainable=False)
    weights = LAYERS * sum(rows * columns for rows, columns in MATRICES["llama"])
    found, of_plain = policy.shape(module), policy.shape(plain)
    assert (found.trunk, found.head) == (of_plain.trunk, of_plain.head) == (weights, 64 * 64)
    assert found.weight_bytes == weights * (1 if kind == "8bit" else 0.5) + 4 * found.head
    assert of_plain.weight_bytes == 4 * (weights + of_plain.head)


# What a run makes of them


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        main(["run", *words])
    return int(cast(int, done.value.code)), capsys.readouterr().err


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if not k.startswith(("time/", "perf/", "memory/"))} for one in found]


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_run_learns_resumes_to_the_bit_and_saves_adapters(
    name: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--algo", "sft", "--model", str(tiny_model), "--mem", f"fp32,lora,{name}", "--save-every", "1",
             "--optim.learning-rate", "3e-3", "--mem.lora.targets", "all-linear", "--track", "none", "--eval-rows", "0",
             "--keep", "20")  # fmt: skip
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(capsys, *words, "--max-steps", "12", "--output", str(whole))[0] == 0
    assert run(capsys, *words, "--max-steps", "5", "--output", str(halves))[0] == 0
    assert run(capsys, *words, "--max-steps", "12", "--output", str(halves), "--resume")[0] == 0
    assert lines(halves) == lines(whole)
    losses = [one["loss"] for one in lines(whole)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])  # seen: 15% less and more
    ours, theirs = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (whole, halves))
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all("lora_" in key for key in ours)
    config = json.loads((whole / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_the_engine_samples_from_it_and_says_that_it_is_not_exact(
    name: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log-probs are recomputed, and differ from the trainer's by rounding alone."""
    out = tmp_path / "run"
    words = ("--algo", "ppo", "--mem", f"fp32,lora,{name}", "--max-steps", "1", "--batch-size", "16", "--eval-rows",
             "0", "--track", "none", "--output", str(out))  # fmt: skip
    assert run(capsys, *words)[0] == 0
    (line,) = lines(out)
    assert line["response/length"] > 1
    assert line["kl/k3"] == pytest.approx(0.0, abs=1e-9)  # the reference is the same weights with adapters at zero


# Who may have them

CPU = Machine(2, frozenset({"avx2", "avx512_bf16"}), 8 << 30, (), 1)
GPU = attrs.evolve(CPU, gpus=(Gpu("a GPU", 8 << 30, (8, 0)),))


def planned(typed: Typed, registry: Registry, *words: str) -> Plan:
    return compose(typed(*words), registry, CPU)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_a_trained_role_needs_adapters(name: str, typed: Typed, installed: Registry) -> None:
    start = time.process_time()  # of this process: others may be at work
    with pytest.raises(RequestError) as error:
        planned(typed, installed, "--algo", "ppo", "--mem", name)
    assert time.process_time() - start < 1.0
    assert [problem.what for problem in error.value.problems] == [
        f"--mem {name}: the role {role} is trained, and quantised weights take no gradient"
        for role in ("policy", "value")
    ]
    assert {problem.fix for problem in error.value.problems} == {
        f"train adapters on them: --mem lora,{name}; or quantise frozen roles alone: --mem reference={name}"
    }
    assert error.value.suggestion.startswith("rlhf run --algo ppo")
    for said in (("--mem", f"lora,{name}"), ("--mem", f"reference={name}")):  # what it says to type
        assert name in [c.name for c in planned(typed, installed, "--algo", "ppo", *said).mem]


def test_a_role_alone_is_judged_alone(typed: Typed, installed: Registry) -> None:
    with pytest.raises(RequestError) as error:
        planned(typed, installed, "--algo", "ppo", "--mem", "policy=4bit")
    assert len(error.value.problems) == 1 and "the role policy is trained" in error.value.problems[0].what
    assert error.value.suggestion == "rlhf run --algo ppo --mem policy=4bit,lora"
    made = planned(typed, installed, *error.value.suggestion.split()[2:])
    assert [c.name for c in made.role("policy").mem] == ["fp32", "4bit", "lora"]
    assert [c.name for c in made.role("value").mem] == ["fp32"]
    made = planned(typed, installed, "--algo", "ppo", "--mem", "lora,4bit")
    assert made.role("reference").view == "adapters-off"  # of the same quantised base: what was said for it holds


def test_a_role_has_one_quantisation(typed: Typed, installed: Registry) -> None:
    with pytest.raises(RequestError) as error:
        planned(typed, installed, "--algo", "sft", "--mem", "lora,4bit,8bit")
    assert [problem.what for problem in error.value.problems] == [
        "--mem 4bit and 8bit: a role has one quantisation (role policy)"
    ]
    made = planned(typed, installed, "--algo", "ppo", "--mem", "lora,4bit", "--mem", "value=lora,8bit")
    assert [c.name for c in made.role("value").mem] == ["fp32", "8bit", "lora"]


def test_a_model_that_is_quantised_already(typed: Typed, installed: Registry, tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(RequestError) as error:
        planned(typed, installed, "--algo", "sft", "--mem", "lora,4bit", "--model", str(tmp_path))
    assert "is quantised already, by gptq (role policy)" in error.value.problems[0].what


def test_without_bitsandbytes_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    registry = load()
    monkeypatch.setattr("rlhf.registry._loaded", registry)
    assert {o.name: o.status for o in registry.offers_of("mem") if o.name in ("4bit", "8bit", "lora")} == {
        "4bit": "missing", "8bit": "missing", "lora": "ok",
    }  # fmt: skip
    code, err = run(capsys, "--algo", "sft", "--mem", "lora,4bit", "--dry-run")
    assert code == 2 and "needs the module 'bitsandbytes': pip install 'rlhf-kit[quant]'" in err


def test_an_old_bitsandbytes_is_told(typed: Typed, installed: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(version: str, *words: str, on: Machine = CPU) -> list[str]:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        try:
            compose(typed("--algo", "sft", *words), installed, on)
        except RequestError as error:
            return [problem.what for problem in error.problems]
        return []

    mem, optim = ("--mem", "lora,4bit"), ("--optim", "adamw8bit")
    assert told("0.45.3", *mem) == ["--mem 4bit needs bitsandbytes 0.48 or newer, and 0.45.3 is installed"]
    assert told("0.49.2", *optim) == [
        "--optim adamw8bit needs bitsandbytes 0.50 or newer on a CPU, and 0.49.2 is installed"
    ]
    assert told("0.45.3", *optim, on=GPU) == [
        "--optim adamw8bit needs bitsandbytes 0.48 or newer, and 0.45.3 is installed"
    ]
    assert told("0.48.0", *mem) == told("0.49.2", *optim, on=GPU) == told("1.0", *mem, *optim) == []


@needs("bitsandbytes", "0.49")
def test_rows_that_would_be_unpacked_wrongly_are_refused(
    typed: Typed, installed: Registry, folder: Folder, strategies: Strategies, prepared: Prepared
) -> None:
    """bitsandbytes from 0.49 on counts blocks by rows when it unpacks on a CPU, and not when it packs. Where a later
    version mends it, this fails: then the rule and the how-to end with the version before."""
    path = folder("llama", intermediate_size=96)
    words = ("--algo", "sft", "--model", path)
    with pytest.raises(RequestError) as error:
        planned(typed, installed, *words, "--mem", "lora,4bit")
    assert "unpacks rows of 96 weights wrongly on a CPU" in error.value.problems[0].what
    assert compose(typed(*words, "--mem", "lora,4bit"), installed, GPU)
    assert planned(typed, installed, *words, "--mem", "lora,8bit")
    with pytest.raises(RequestError) as error:  # where the config doesn't tell
        prepared(path, strategies("fp32", "4bit"), trainable=False)
    assert "unpacks rows of 96 weights wrongly here (model.layers.0.mlp.down_proj of " in error.value.problems[0].what
    module, _ = prepared(path, strategies("fp32", "8bit"), trainable=False)
    assert len(quantised(module)) == LAYERS * 7


def test_an_adapter_is_not_merged_into_quantised_weights(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--algo", "sft", "--eval-rows", "0", "--max-steps", "1", "--track", "none")
    first = tmp_path / "first"
    assert run(capsys, *words, "--model", str(tiny_model), "--mem", "lora", "--output", str(first))[0] == 0
    code, err = run(capsys, *words, "--model", str(first), "--mem", "lora,4bit", "--output", str(tmp_path / "second"))
    assert code == 2 and f"rlhf export {first}/model" in err and not (tmp_path / "second").exists()
