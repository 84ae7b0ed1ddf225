"""Precision: what each strategy makes of a load, how near bf16 comes to fp32, and who takes the slot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.cli import main
from rlhf.compose import compose
from rlhf.entries import AlgorithmEntry, BackendEntry, FormatEntry, LauncherEntry, OptimizerEntry, PolicyEntry, Role
from rlhf.errors import RequestError
from rlhf.facts import Gpu, Machine
from rlhf.interfaces import HeadRequest, LoadSpec, MemoryStrategy
from rlhf.plan import Plan
from rlhf.recipe import Pick, Recipe, RoleRecipe
from rlhf.registry import Registry, _Source
from rlhf.rows import CompletionRow
from rlhf.sequences import Sequences
from rlhf_plugins.memory import rlhf_memory
from rlhf_plugins.policies.hf import HFPolicy

Folder = Callable[..., str]
Strategies = Callable[..., list[MemoryStrategy]]
Prepared = Callable[..., tuple[nn.Module, LoadSpec]]


@pytest.mark.parametrize(
    ("name", "trainable", "weights", "compute"),
    [
        ("bf16", True, torch.float32, torch.bfloat16),
        ("bf16", False, torch.bfloat16, None),
        ("fp32", True, torch.float32, None),
        ("fp32", False, torch.float32, None),
        ("fp16", True, torch.float32, torch.float16),
        ("fp16", False, torch.float16, None),
    ],
)
def test_what_is_loaded(strategies: Strategies, name: str, trainable: bool, weights: Any, compute: Any) -> None:
    (strategy,) = strategies(name)
    given = LoadSpec("r", "m", "lm", trainable, "keep", "cpu", weights=torch.float64, compute=torch.float64)
    found = strategy.load(given)
    assert (found.weights, found.compute, found.model) == (weights, compute, "m")


SEQUENCES = Sequences.of([torch.tensor([5, 6, 7])], [torch.arange(8, 40)])


def logp(policy: HFPolicy, module: nn.Module) -> torch.Tensor:
    found: torch.Tensor = policy.score(module, SEQUENCES, [HeadRequest("policy", "lm")])[0].logp
    return found


def test_trained_bf16_is_near_fp32(
    folder: Folder, strategies: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    path = folder("llama")
    exact, _ = prepared(path, strategies("fp32"))
    mixed, _ = prepared(path, strategies("bf16"))
    expected, found = logp(policy, exact), logp(policy, mixed)
    assert found.dtype == torch.float32
    # bfloat16 rounds to 2^-9 of a number. The logits are below 0.5 here (initialised at 0.02), each the end of a
    # dozen products: sqrt(12) x 2^-9 x 0.5 = 0.0034. Some difference must be there, or it isn't bf16.
    worst = float((found - expected).abs().max().detach())
    assert 1e-5 < worst < 0.0034
    found.sum().backward()
    expected.sum().backward()
    for (name, a), b in zip(exact.named_parameters(), mixed.parameters(), strict=True):
        assert b.dtype == torch.float32 and b.grad is not None and b.grad.dtype == torch.float32, name
        assert a.grad is not None
        # relative to the whole gradient: sqrt of some dozen products forward and backward, x 2^-9, is 1.5%
        assert (b.grad - a.grad).norm() < 0.03 * a.grad.norm(), name


def test_small_updates_are_not_lost(folder: Folder, strategies: Strategies, prepared: Prepared) -> None:
    """An update of 1e-6 is far below bfloat16's step at 0.02, which is 6e-5: float32 masters take it."""
    trained, _ = prepared(folder("llama"), strategies("bf16"))
    frozen, _ = prepared(folder("llama"), strategies("bf16"), trainable=False)
    for module, moves in ((trained, True), (frozen, False)):
        weight: Any = module.get_parameter("model.layers.0.mlp.up_proj.weight")
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1e-6)
        assert bool(((weight - before).abs() > 0).float().mean() > 0.5) is moves


def test_frozen_bf16_is_half_the_bytes(
    folder: Folder, strategies: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    path = folder("llama")
    exact, _ = prepared(path, strategies("fp32"), trainable=False)
    small, _ = prepared(path, strategies("bf16"), trainable=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    worst = float((logp(policy, small) - logp(policy, exact)).abs().max())
    # As above, and the weights and what passes between layers are rounded too: twice as many roundings.
    assert 1e-5 < worst < 0.005


def test_fp16_scales_the_loss_by_its_options(strategies: Strategies) -> None:
    (strategy,) = strategies(fp16={"initial_scale": 8.0, "growth_interval": 5})
    scaler = strategy.loss_scaler()
    assert scaler is not None and (scaler.scale, scaler.interval) == (8.0, 5)
    assert all(other.loss_scaler() is None for other in strategies("bf16", "fp32"))


@pytest.mark.matrix  # measuring what the chip does in float16, for the floor, takes seconds on a CPU
def test_fp16_trains_like_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run on the CPU, whose float16 products are slow and right: the same losses but for rounding. Its first
    scale overflows, which is found out: the step is left out and counted, and the scale halved."""

    def steps(mem: str, *words: str) -> list[dict[str, float]]:
        run = tmp_path / mem
        shape = ("--max-steps", "2", "--batch-size", "2", "--eval-rows", "0", "--track", "none")
        rate = ("--optim.learning-rate", "0.001")
        with pytest.raises(SystemExit) as left:
            main(["run", "--algo", "sft", "--mem", mem, "--output", str(run), *shape, *rate, *words])
        assert left.value.code == 0
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    expected, found = steps("fp32"), steps("fp16", "--mem.fp16.initial-scale", str(2.0**30))
    # float16 rounds to 2^-11 of a number: a dozen products of log-probs of order 1 to 10
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], abs=0.02)
    assert [row["optim/skipped"] for row in found] == [1.0, 1.0]
    assert [row["optim/loss_scale"] for row in found] == [2.0**30, 2.0**29]
    assert "optim/loss_scale" not in expected[0]


def test_fp16_gradients_are_near_fp32s(
    folder: Folder, strategies: Strategies, prepared: Prepared, policy: HFPolicy
) -> None:
    path = folder("llama")
    exact, _ = prepared(path, strategies("fp32"))
    mixed, _ = prepared(path, strategies("fp16"))
    (strategy,) = strategies(fp16={"initial_scale": 256.0})  # of a sum over 32 tokens, not of a mean
    scaler = strategy.loss_scaler()
    assert scaler is not None
    logp(policy, exact).sum().backward()
    scaler.scaled(logp(policy, mixed).sum()).backward()
    scaler.unscale(mixed.parameters())
    for (name, a), b in zip(exact.named_parameters(), mixed.parameters(), strict=True):
        assert b.dtype == torch.float32 and b.grad is not None and a.grad is not None
        # relative to the whole gradient: sqrt of some dozen products, forward and backward, x 2^-12, is .2%
        assert (b.grad - a.grad).norm() < 0.004 * a.grad.norm(), name


# Who takes the slot


def registry() -> Registry:
    """These strategies, and about them the least that makes a plan."""
    found = Registry()
    source = _Source("test", "test", "0")
    for entry in rlhf_memory():
        found.add(entry, source)
    roles = (Role("policy", trainable=True), Role("reference", start="policy"))
    found.add(AlgorithmEntry(name="a", summary="", impl="m:C", roles=roles, data=CompletionRow), source)
    for kind in (PolicyEntry, OptimizerEntry, BackendEntry, LauncherEntry):
        found.add(kind(name="only", summary="", impl="m:C", rank=1), source)
    found.add(FormatEntry(name="lines", summary="", impl="m:C", suffixes=(".jsonl",)), source)
    return found


@pytest.fixture
def plan(folder: Folder, tmp_path: Path) -> Callable[..., Plan]:
    path = folder("llama")
    (tmp_path / "d.jsonl").write_text("{}")

    def make(
        *mem: str,
        flags: tuple[str, ...] = ("avx512_bf16",),
        reference: tuple[str, ...] | None = None,
        vendor: str = "AuthenticAMD",
        gpus: tuple[Gpu, ...] = (),
    ) -> Plan:
        chosen = {"reference": RoleRecipe(mem=tuple(map(Pick, reference)))} if reference is not None else {}
        recipe = Recipe(
            picks={"algo": (Pick("a"),), "mem": tuple(map(Pick, mem))},
            roles=chosen,
            model=path,
            data=(str(tmp_path / "d.jsonl"),),
        )
        return compose(recipe, registry(), Machine(2, frozenset(flags), 1 << 34, gpus, 1, vendor))

    return make


def names(plan: Plan, role: str) -> list[str]:
    return [component.name for component in plan.role(role).mem]


def test_bf16_unasked_where_the_chip_has_it(plan: Callable[..., Plan]) -> None:
    assert names(plan(), "policy") == names(plan(), "reference") == ["bf16"]
    assert names(plan(flags=()), "policy") == ["fp32"]
    assert names(plan(vendor="GenuineIntel"), "policy") == ["fp32"]  # which has it, slower than float32
    assert names(plan("bf16", vendor="GenuineIntel"), "policy") == ["bf16"]
    assert names(plan(flags=("avx512_bf16", "amx_bf16"), vendor="GenuineIntel"), "policy") == ["bf16"]
    assert names(plan("fp32"), "policy") == ["fp32"]


def test_order_typed_is_nothing(plan: Callable[..., Plan]) -> None:
    for mem in (("checkpointing", "lora", "bf16"), ("bf16", "lora", "checkpointing")):
        assert names(plan(*mem), "policy") == ["bf16", "lora", "checkpointing"]


def test_reference_costs_nothing_beside_adapters(plan: Callable[..., Plan]) -> None:
    assert plan("lora").role("reference").view == "adapters-off"
    assert plan("checkpointing").role("reference").view == "own"
    assert names(plan("checkpointing"), "reference") == ["bf16"]  # only what is trained is checkpointed


def test_bf16_named_where_the_chip_has_it_not(plan: Callable[..., Plan]) -> None:
    assert names(plan("bf16", flags=()), "policy") == ["bf16"]  # a CPU goes by way of float32
    with pytest.raises(RequestError, match="--mem bf16 needs 'bf16', which nothing provides"):
        plan("bf16", gpus=(Gpu("T4", 16 << 30, (7, 5)),))


def test_one_precision_a_role(plan: Callable[..., Plan]) -> None:
    with pytest.raises(RequestError, match="bf16 and fp32: a role has one precision"):
        plan("bf16", "fp32")
    mixed = plan("bf16", reference=("fp32",))
    assert (names(mixed, "policy"), names(mixed, "reference")) == (["bf16"], ["fp32"])


@pytest.mark.parametrize("name", ["lora", "checkpointing"])
def test_what_is_for_training_is_refused_on_a_frozen_role(plan: Callable[..., Plan], name: str) -> None:
    with pytest.raises(
        RequestError, match=f"--mem reference={name}: the role reference isn't trained\n.*one of: policy"
    ):
        plan(reference=(name,))
