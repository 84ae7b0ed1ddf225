"""LoRA: the formula, what is trained and in which precision, and the base underneath."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rlhf.errors import RequestError
from rlhf.interfaces import Context, HeadRequest, LoadSpec, MemoryStrategy
from rlhf.options import structure
from rlhf.sequences import Sequences
from rlhf_plugins.memory import LoraConfig
from rlhf_plugins.memory.lora import Lora, linear_names
from rlhf_plugins.policies.hf import HFPolicy

Model = Callable[..., nn.Module]
Folder = Callable[..., str]
Strategies = Callable[..., list[MemoryStrategy]]
Prepared = Callable[..., tuple[nn.Module, LoadSpec]]
SPEC = LoadSpec("policy", "some/model", "lm", True, "keep", "cpu", seed=5)


def lora(**options: Any) -> Lora:
    return Lora(LoraConfig(**options), Context(None))  # type: ignore[arg-type]


def logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = module(input_ids=ids).logits
    return found


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def disturb(module: nn.Module) -> None:
    """Give B a value: at its zero the adapters do nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(module).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("options", [{}, {"targets": ("all-linear",)}, {"rslora": True}])
def test_first_forward_is_the_bases_own(
    family: str, make_model: Model, ids: torch.Tensor, options: dict[str, Any]
) -> None:
    expected = logits(make_model(family), ids)
    assert torch.equal(logits(lora(**options).adapt(make_model(family), SPEC), ids), expected)  # B = 0: bit for bit


def test_dora_starts_at_the_base_too(make_model: Model, ids: torch.Tensor) -> None:
    expected = logits(make_model("llama"), ids)
    found = logits(lora(dora=True).adapt(make_model("llama"), SPEC), ids)
    # The magnitude is divided by the norm it was measured as: float32 rounding, logits below 1.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_adapters_off_is_the_base(family: str, make_model: Model, ids: torch.Tensor, head: Any) -> None:
    expected = logits(make_model(family, head), ids[:1])
    strategy = lora()
    module = strategy.adapt(make_model(family, head), attrs.evolve(SPEC, head=head))
    disturb(module)
    changed = logits(module, ids[:1])
    assert (changed - expected).abs().max() > 1e-3
    with strategy.adapters_off(module):
        assert torch.equal(logits(module, ids[:1]), expected)
    assert torch.equal(logits(module, ids[:1]), changed)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_formula(make_model: Model, rslora: bool, scale: float) -> None:
    """W x + scale B A x on one matrix, by hand."""
    module = lora(rank=4, alpha=12, rslora=rslora).adapt(make_model("llama"), SPEC)
    disturb(module)
    layer: Any = next(part for part in module.modules() if isinstance(part, LoraLayer))
    a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    assert a.shape == (4, 32) and b.shape == (32, 4)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    # float32 sums of 32 products of order 1, associated otherwise
    torch.testing.assert_close(layer(x), x @ w.T + scale * (x @ a.T) @ b.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_only_adapters_and_head_learn(family: str, make_model: Model, ids: torch.Tensor, head: Any) -> None:
    module = lora().adapt(make_model(family, head), attrs.evolve(SPEC, head=head))
    disturb(module)
    logits(module, ids[:1]).square().sum().backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    targets = 4 * (1 if family == "gpt2" else 2)  # layers x (c_attn | q_proj, v_proj)
    adapters = {name for name in with_gradient if "lora_A" in name or "lora_B" in name}
    assert len(adapters) == 2 * targets
    rest = with_gradient - adapters
    assert len(rest) == (head == "scalar") and all("score.modules_to_save" in name for name in rest)
    assert with_gradient == set(trained(module))


def test_reference_between_forward_and_backward(make_model: Model, ids: torch.Tensor) -> None:
    """Switching the adapters off and on while a graph is pending loses no gradient."""

    def gradients(with_reference: bool) -> list[torch.Tensor]:
        strategy = lora()
        module = strategy.adapt(make_model("llama"), SPEC)
        disturb(module)
        loss = logits(module, ids).square().sum()
        if with_reference:
            with torch.no_grad(), strategy.adapters_off(module):
                logits(module, ids)
        loss.backward()
        return [p.grad for p in trained(module).values() if p.grad is not None]

    plain, interrupted = gradients(False), gradients(True)
    assert len(plain) == len(interrupted) == 16
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(plain, interrupted, strict=True))


WRONG = [
    ("gpt2", "lm", ("q_proj",), "q_proj: names no linear module", "it has c_attn, c_proj, c_fc; or all-linear"),
    (
        "llama",
        "lm",
        ("q_proj", "c_attn"),
        "targets c_attn: ",
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down",
    ),
    ("llama", "lm", ("lm_head",), "lm_head: ", "it has q_proj"),  # read otherwise than by being called
    ("llama", "scalar", ("score",), "score: ", "it has q_proj"),  # trained whole
    ("llama", "lm", ("roj",), "roj: ", "it has q_proj"),  # whole names, no endings
]


@pytest.mark.parametrize(("family", "head", "targets", "what", "fix"), WRONG)
def test_targets_that_are_not_there(
    make_model: Model, family: str, head: Any, targets: tuple[str, ...], what: str, fix: str
) -> None:
    with pytest.raises(RequestError) as error:
        lora(targets=targets).adapt(make_model(family, head), attrs.evolve(SPEC, head=head))
    (problem,) = error.value.problems
    assert what in problem.what and "some/model (role policy)" in problem.what
    assert fix in problem.fix


def adapted(module: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def test_targets_left_out(make_model: Model) -> None:
    assert adapted(lora().adapt(make_model("llama"), SPEC)) == {"q_proj", "v_proj"}
    assert adapted(lora().adapt(make_model("gpt2"), SPEC)) == {"c_attn"}
    unknown: Any = make_model("llama")
    unknown.config.model_type = "nobody-knows-it"
    assert adapted(lora().adapt(unknown, SPEC)) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_all_linear_is_what_is_listed(family: str, make_model: Model, head: Any) -> None:
    listed = linear_names(make_model(family, head))
    module = lora(targets=("all-linear",)).adapt(make_model(family, head), attrs.evolve(SPEC, head=head))
    names = [name for name, part in module.named_modules() if isinstance(part, LoraLayer)]
    assert [name.removeprefix("base_model.model.") for name in names] == listed
    assert len(listed) == 4 * (4 if family == "gpt2" else 7)


def test_adapters_come_from_the_seed(make_model: Model) -> None:
    def drawn(seed: int) -> torch.Tensor:
        module = lora().adapt(make_model("llama"), attrs.evolve(SPEC, seed=seed))
        return next(p for name, p in trained(module).items() if "lora_A" in name)

    one = drawn(1)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    module = make_model("llama")
    torch.set_rng_state(before)
    lora().adapt(module, SPEC)
    assert torch.equal(torch.get_rng_state(), before)  # the run's own random numbers are left alone
    assert torch.equal(drawn(1), one) and not torch.equal(drawn(2), one)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_bf16_base_float32_adapters(folder: Folder, strategies: Strategies, prepared: Prepared, head: Any) -> None:
    """Whatever the order typed: the base has no master to keep, the adapters are masters."""
    module, spec = prepared(folder("llama", head), strategies("lora", "bf16"), head)
    assert (spec.weights, spec.compute) == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in trained(module).values()} == {torch.float32}
    frozen = {p.dtype for name, p in module.named_parameters() if not p.requires_grad and "score" not in name}
    assert frozen == {torch.bfloat16}


def test_fp32_stays_fp32(folder: Folder, strategies: Strategies, prepared: Prepared) -> None:
    module, spec = prepared(folder("llama"), strategies("lora", "fp32"))
    assert (spec.weights, spec.compute) == (torch.float32, None)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_autocast_needs_no_cast_of_peft(
    folder: Folder, strategies: Strategies, prepared: Prepared, ids: torch.Tensor
) -> None:
    """Left to PEFT, an adapter's input goes to float32 and back to bfloat16: two copies, the same bits."""
    module, _ = prepared(folder("llama"), strategies("lora", "bf16"))
    disturb(module)
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(module, ids)
        for layer in layers:
            layer.cast_input_dtype_enabled = True
        assert torch.equal(logits(module, ids), found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_saved_and_loaded_again(
    folder: Folder,
    strategies: Strategies,
    prepared: Prepared,
    policy: HFPolicy,
    tmp_path: Path,
    head: Any,
    precision: str,
) -> None:
    """What was trained, head included, is what a fresh process loads (adapters merged)."""
    module, spec = prepared(folder("llama", head), strategies("lora", precision), head)
    disturb(module)
    policy.save(module, tmp_path / "saved", spec)
    again = policy.load(LoadSpec("policy", str(tmp_path / "saved"), head, False, "keep", "cpu"))
    sequences = Sequences.of([torch.tensor([5, 6, 7])], [torch.tensor([8, 9])])
    request = [HeadRequest("policy", head)]
    with torch.no_grad():
        (ours,), (theirs,) = policy.score(module, sequences, request), policy.score(again, sequences, request)
    # Merging adds B A to W, then multiplies: float32 rounding of numbers of order 1. bf16 has 8 bits: 2^-8 of them a
    # product, over four layers.
    bound = 1e-4 if precision == "fp32" else 0.1
    found, expected = (s.logp if head == "lm" else s.score for s in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_dropout_acts_in_the_loss_alone(make_model: Model, ids: torch.Tensor) -> None:
    module = lora(dropout=0.5, targets=("all-linear",)).adapt(make_model("llama"), SPEC)
    disturb(module)
    module.eval()
    with torch.no_grad():
        quiet = logits(module, ids)
        assert torch.equal(logits(module, ids), quiet)
    assert not torch.equal(logits(module, ids), quiet)


def test_dora_with_dropout_is_refused() -> None:
    """PEFT's DoRA ignores dropout in evaluation mode: it would do nothing, silently."""
    config, problems = structure(LoraConfig, {"dora": True, "dropout": 0.1}, "--mem.lora.")
    assert config is None and "dora has no dropout" in str(problems[0])
