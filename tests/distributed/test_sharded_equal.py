"""Two ranks compute what one process does: every step's loss, the final weights, and the folder that is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sharded_cases import SHARDINGS, VARIANTS, recipe

from warm import Ranks, files, losses, metrics, model

FEW = {("sft", "zero2", False), ("sft", "zero1", True), ("dpo", "fsdp2", True), ("dpo", "zero3", True),
       ("ppo", "fsdp2", False), ("ppo", "zero3-offload", False)}  # fmt: skip
"""Touch each algorithm, sharding and adapter once."""
ALL = [(run, sharding, lora) for run in ("sft", "dpo", "ppo") for sharding in SHARDINGS for lora in (False, True)]
CASES = [pytest.param(*case, marks=pytest.mark.matrix if case in FEW else pytest.mark.matrix_full) for case in ALL]


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(("run", "sharding", "lora"), CASES)
def test_two_ranks_train_as_one_process(
    run: str, sharding: str, lora: bool, two: Ranks, alone: Callable[..., Path], tmp_path: Path
) -> None:
    single = alone(run, lora)
    two(recipe(run, tmp_path, sharding, lora), tmp_path / "run")
    expected, found = losses(single), losses(tmp_path / "run")
    # fp32 sums in another order: an ulp of a loss of order 1 is 6e-8, and 8 steps carry it on
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected[-1] / expected[0] - 1) > 0.01  # it learnt something, and the same
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(single), strict=True):
        # a norm of order 10 adds up as many squares as there are weights
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-4)
        assert ours["optim/updates"] == theirs["optim/updates"]
    after, other = model(single), model(tmp_path / "run")
    # Adam's step is the rate times a quotient of near-equal numbers: where both are tiny, rounding shows
    assert far(after, other) < (3e-4 if lora else 3e-5)
    assert files(tmp_path / "run") == files(single)


FEW_VARIANTS = {
    ("4bit", "fsdp2"),
    ("4bit", "zero3"),
    ("a critic that warms up", "zero2"),
    ("a rank without rows", "zero3"),
    ("rounds, and rows beside", "fsdp2"),
    ("bf16, lora", "zero3"),
}
ALL_VARIANTS = [
    (variant, sharding)
    for variant in VARIANTS
    for sharding in SHARDINGS
    if (variant, sharding) != ("8bit", "fsdp2")  # refused, see keeps_its_weights
]


@pytest.mark.parametrize(
    ("variant", "sharding"),
    [
        pytest.param(*x, marks=pytest.mark.matrix if x in FEW_VARIANTS else pytest.mark.matrix_full)
        for x in ALL_VARIANTS
    ],
)
def test_with_what_else_there_is(
    variant: str, sharding: str, two: Ranks, alone: Callable[..., Path], tmp_path: Path
) -> None:
    run, more = VARIANTS[variant]
    adapters = any("lora" in str(strategy) for strategy in more["mem"])
    single = alone(run, adapters, **more)
    two(recipe(run, tmp_path, sharding, adapters, **more), tmp_path / "run")
    # bf16 rounds to 2^-8 of a value, and another micro-batch rounds otherwise
    tolerance = {"rel": 2e-2} if "bf16" in variant else {"abs": 1e-5}
    assert losses(tmp_path / "run") == pytest.approx(losses(single), **tolerance)
    weights = model(tmp_path / "run")
    assert far(model(single), weights) < (2e-2 if "bf16" in variant else 3e-5)
    assert files(tmp_path / "run") == files(single)
    if "bf16" in variant:  # what is trained is kept in float32
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    "sharding", [pytest.param("fsdp2", marks=pytest.mark.matrix), pytest.param("zero3", marks=pytest.mark.matrix_full)]
)
def test_adapters_on_a_merged_adapter_are_saved_as_a_whole_model(
    sharding: str, one: Ranks, two: Ranks, alone: Callable[..., Path], tmp_path: Path
) -> None:
    """A PEFT folder could name only one base, so rank 0 makes a module of the gathered weights, and merges there."""
    start = {"model": str(alone("sft", True) / "model"), "max_steps": 2}
    one(recipe("sft", tmp_path, lora=True, **start), tmp_path / "one")
    two(recipe("sft", tmp_path, sharding, lora=True, **start), tmp_path / "two")
    assert "config.json" in files(tmp_path / "two") and "adapter_config.json" not in files(tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert far(model(tmp_path / "one"), model(tmp_path / "two")) < 3e-5
