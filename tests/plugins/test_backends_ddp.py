"""How ddp adds gradients up: with a fake group of ranks, in which the other rank has what it is given."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed
from torch import nn

from fake_ranks import in_two_ranks
from rlhf.errors import RunError
from rlhf.interfaces import OptimizerStrategy, TrainedParameter
from rlhf.scaling import LossScaler
from rlhf.world import World
from rlhf_plugins.backends.ddp import DDP, Adder, _buckets, check_alike


class FakeWorld(World):
    """The other rank has gradients for the parameters of these numbers."""

    size = 2

    def __init__(self, others: list[bool]) -> None:
        self.others = others

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return x | torch.tensor(self.others)


class FakeWork:
    def wait(self) -> None: ...


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buckets that were added up, in order. The other rank's gradients are all 10."""
    found: list[int] = []

    def all_reduce(flat: torch.Tensor, async_op: bool) -> FakeWork:
        assert async_op
        found.append(flat.numel())
        flat += 10.0
        return FakeWork()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return found


class SGD(OptimizerStrategy):
    def build(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p.parameter for p in parameters], "lr": 0.5, "base_lr": 0.5}])


@pytest.mark.parametrize(
    ("own", "other", "scale"),
    [(3.0, 5.0, 4.0), (math.inf, 5.0, 2.0), (3.0, math.inf, 2.0), (math.inf, -math.inf, 2.0), (3.0, math.nan, 2.0)],
)
def test_what_overflowed_on_one_rank_is_left_out_on_all(
    monkeypatch: pytest.MonkeyPatch, own: float, other: float, scale: float
) -> None:
    """Each rank judges the sum, which is the same on all; the scale is taken out of it once."""

    def all_reduce(flat: torch.Tensor, async_op: bool) -> FakeWork:
        flat += other * 4.0  # the other rank's loss is scaled too
        return FakeWork()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    backend = DDP.__new__(DDP)  # without the meeting of ranks
    backend.config, backend.world, backend._adder = SimpleNamespace(bucket_mib=1), FakeWorld([True]), None
    backend.scaler = LossScaler(4.0)
    weight = nn.Parameter(torch.ones(1))
    backend.prepare(nn.Module(), [TrainedParameter("weight", weight, "policy", None)], SGD(None, cast(Any, None)))
    backend.backward((weight * own).sum(), last=True)
    result = backend.update(1.0)
    assert (result.loss_scale, backend.scaler.scale, result.skipped) == (4.0, scale, scale < 4.0)
    assert weight.item() == (1.0 if result.skipped else 1.0 - 0.5 * (own + other))
    assert result.skipped or result.grad_norm == own + other
    assert backend.state()["scaler"] == {"scale": scale, "clean": int(not result.skipped)}


def three() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]


def test_added_up_while_the_last_backward_runs_and_not_before(started: list[int]) -> None:
    parameters = three()
    adder = Adder(parameters, 1, FakeWorld([True] * 3))  # a bucket a parameter
    loss = cast(Any, sum)(p.sum() * (i + 1) for i, p in enumerate(parameters))
    loss.backward(retain_graph=True)
    assert started == []  # another micro-batch follows
    adder.begun = True
    loss.backward()
    assert started == [4, 3, 2]  # the last layers first, all of them before `finish`
    adder.finish()
    assert [p.grad.unique().tolist() for p in parameters if p.grad is not None] == [[12.0], [14.0], [16.0]]


def test_buckets_start_in_one_order_whatever_is_used(started: list[int]) -> None:
    parameters = three()
    adder = Adder(parameters, 1, FakeWorld([False, False, True]))
    adder.begun = True
    parameters[0].sum().backward()
    assert started == []  # its bucket waits for those before it, which other ranks may start with
    adder.finish()
    assert started == [4, 3, 2]
    first, nobody, other = (p.grad for p in parameters)
    assert first is not None and first.tolist() == [11.0, 11.0]
    assert nobody is None  # in one process too: the optimiser must leave it alone
    assert other is not None and other.tolist() == [10.0] * 4


def test_each_step_begins_anew(started: list[int]) -> None:
    parameters = three()
    adder = Adder(parameters, 1 << 20, FakeWorld([True] * 3))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        adder.begun = True
        cast(Any, sum)(p.sum() for p in parameters).backward()
        adder.finish()
        assert all(p.grad is not None and p.grad.unique().tolist() == [11.0] for p in parameters)
    assert started == [9, 9]


def test_a_gradient_in_two_parts_is_no_silent_error(started: list[int]) -> None:
    parameter = nn.Parameter(torch.ones(2))
    adder = Adder([parameter], 1, FakeWorld([True]))
    adder.begun = True
    parameter.sum().backward()
    with pytest.raises(RunError, match="in two parts"):
        parameter.sum().backward()


def test_buckets_are_of_a_size_and_of_one_dtype() -> None:
    sizes = [(3, torch.float32), (3, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16), (9, torch.float32)]
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]

    def numbers(size: int) -> list[list[int]]:
        return [[p.numel() for p in bucket.parameters] for bucket in _buckets(parameters, size)]

    assert numbers(16) == [[9], [3, 2], [3], [3]]  # 36 bytes in one go, as it can't be cut; 6 + 4; 12; 12
    assert numbers(1000) == [[9], [3, 2], [3, 3]]  # by dtype alone


def test_ranks_must_begin_with_the_same_weights() -> None:
    def work(rank: int, world: World) -> str:
        parameter = nn.Parameter(torch.full((3,), 1.0 + 0.001 * rank))
        try:
            check_alike([TrainedParameter("bodies.policy.x", parameter, "policy", None)], world)
        except RunError as error:
            return str(error)
        return ""

    first, second = in_two_ranks(work)
    assert first == "" and second.startswith("bodies.policy.x has other weights than on rank 0")
