"""The self-check: what is compared, what is told apart, and how far is too far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fake_ranks import in_two_ranks
from rlhf.sequences import Sequences
from rlhf.world import World
from rlhf_plugins.engines.vllm import check
from rlhf_plugins.engines.vllm.worker import _fingerprints, fingerprint


def test_the_gap_is_over_all_ranks() -> None:
    def one(rank: int, world: World) -> check.Gap:
        own = torch.tensor([-1.0, -2.0, -3.0]) if rank == 0 else torch.zeros(0)
        return check.gap(own, own - torch.tensor([0.0, 0.3, 0.6])[: len(own)], world)

    first, second = in_two_ranks(one)
    assert first == second
    assert first.mean == pytest.approx(0.3, abs=1e-6)  # float32
    assert (first.largest, first.tokens) == (pytest.approx(0.6, abs=1e-6), 3)


def test_nan_is_too_far() -> None:
    found = check.gap(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]), World())
    assert not any(found.within(tolerance) for tolerance in check.TOLERANCES.values())


@pytest.mark.parametrize(
    ("dtype", "mean", "largest", "fine"),
    [
        (torch.float32, 1e-6, 2e-5, True),
        (torch.float32, 1e-5, 2e-3, False),  # one token
        (torch.bfloat16, 0.04, 0.28, True),
        (torch.bfloat16, 0.75, 2.0, False),
    ],
)
def test_how_far_is_too_far(dtype: torch.dtype, mean: float, largest: float, fine: bool) -> None:
    assert check.Gap(mean, largest, 100).within(check.TOLERANCES[dtype]) is fine


def test_rows_of_different_groups_are_compared() -> None:
    prompts = [torch.tensor([1]), torch.tensor([2])]
    three = Sequences.of(prompts, [torch.tensor([3])] * 6, prompt_of=[0, 0, 0, 1, 1, 1])
    assert check.sample_of(three).tolist() == [0, 3, 1, 2]
    many = Sequences.of([torch.tensor([i]) for i in range(9)], [torch.tensor([3])] * 9)
    assert check.sample_of(many).tolist() == [0, 1, 2, 3]
    assert check.sample_of(Sequences.of([], [])).tolist() == []


class _Method:
    def apply(self, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.packed)


class FakeLinear(torch.nn.Module):
    """A layer whose matrix is packed away, and can only be multiplied by."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.packed, self.quant_method = weight.clone(), _Method()


def fake_model() -> tuple[Any, dict[str, torch.Tensor]]:
    """Of two fused matrices and a norm, with the weights that a checkpoint has."""
    torch.manual_seed(0)
    own = {f"a.{name}_proj.weight": torch.randn(size, 6) for name, size in (("q", 4), ("k", 2), ("v", 2))}
    own |= {"a.o_proj.weight": torch.randn(6, 4), "norm.weight": torch.rand(6)}
    model: Any = torch.nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    model.a = torch.nn.Module()
    model.a.qkv_proj = FakeLinear(torch.cat([own[f"a.{name}_proj.weight"] for name in "qkv"]))
    model.a.o_proj = FakeLinear(own["a.o_proj.weight"])
    model.norm = torch.nn.Module()
    model.norm.weight = torch.nn.Parameter(own["norm.weight"].clone())
    return model, own


def test_weights_are_the_same() -> None:
    model, own = fake_model()
    apart, count = check.differing(iter(own.items()), lambda shapes: dict(_fingerprints(model, shapes)), 1e-3)
    assert (apart, count) == ({}, 5)


@pytest.mark.parametrize("name", ["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight", "a.o_proj.weight",
                                  "norm.weight"])  # fmt: skip
def test_the_one_that_differs_is_named(name: str) -> None:
    model, own = fake_model()
    changed = {key: tensor * 1.01 if key == name else tensor for key, tensor in own.items()}
    apart, _ = check.differing(iter(changed.items()), lambda shapes: dict(_fingerprints(model, shapes)), 1e-3)
    assert list(apart) == [name]
    assert apart[name] == pytest.approx(0.01 / 1.01, rel=1e-3)  # float32 products


def test_a_part_that_is_not_there_is_not_compared() -> None:
    model, own = fake_model()
    del model.a.o_proj
    assert check.differing(iter(own.items()), lambda shapes: dict(_fingerprints(model, shapes)), 1e-3)[1] == 4


def test_a_fingerprint_is_of_every_element() -> None:
    weight = torch.ones(3, 5)
    before = fingerprint(weight)
    for i in range(3):
        for j in range(5):
            other = weight.clone()
            other[i, j] += 0.1
            assert fingerprint(other) != before
