"""AdamW: schedules, groups and one step by hand."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from rlhf.interfaces import Context, TrainedParameter
from rlhf.plan import Plan
from rlhf_plugins.optimizers import AdamWConfig
from rlhf_plugins.optimizers.adamw import AdamW, schedule


def adamw(**options: Any) -> AdamW:
    return AdamW(AdamWConfig(**options), Context(plan=cast(Plan, None)))


@pytest.mark.parametrize(
    ("name", "warmup", "min_ratio", "expected"),
    [
        ("constant", 0.0, 0.0, [1.0] * 5),
        ("constant", 0.4, 0.0, [1 / 2, 1.0, 1.0, 1.0, 1.0]),  # the first step is not at 0, which would be lost
        ("linear", 0.0, 0.0, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.0, 0.5, [1.0, 0.9, 0.8, 0.7, 0.6]),
        ("linear", 0.2, 0.0, [1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, 0.0, [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]),
        ("cosine", 0.2, 0.1, [1.0] + [0.1 + 0.45 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
        ("linear", 0.99, 0.0, [0.2, 0.4, 0.6, 0.8, 1.0]),  # warm-up alone
    ],
)
def test_schedules(name: str, warmup: float, min_ratio: float, expected: list[float]) -> None:
    found = [schedule(name, step, 5, warmup, min_ratio) for step in range(5)]
    assert found == pytest.approx(expected, rel=1e-12)
    strategy = adamw(schedule=name, warmup=warmup, min_ratio=min_ratio)
    assert [strategy.factor(step, 5) for step in range(5)] == found


def test_a_long_cosine_is_half_way_at_half_time_and_ends_at_its_floor() -> None:
    assert schedule("cosine", 500, 1000, 0.0, 0.2) == pytest.approx(0.6)
    assert schedule("cosine", 999, 1000, 0.0, 0.2) == pytest.approx(0.2, abs=1e-5)  # (pi/1000)^2 / 4 x .8 above it
    assert schedule("linear", 0, 1, 0.5, 0.0) == 1.0  # a run of one step


def parameter(name: str, value: Any, role: str = "policy", rate: float | None = None) -> TrainedParameter:
    return TrainedParameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float32)), role, rate)


def test_each_learning_rate_has_a_group_with_and_one_without_decay() -> None:
    given = [
        parameter("w", [[1.0, 2.0]]),
        parameter("bias", [1.0]),
        parameter("head", [[1.0]], "value", 1e-3),
        parameter("norm", 1.0),
        parameter("same", [[1.0]], "teacher", 2e-5),  # a role's own rate that happens to be the policy's
    ]
    optimizer = adamw(learning_rate=2e-5, weight_decay=0.1).build(given)
    found = {
        (group["lr"], group["base_lr"], group["weight_decay"]): [
            next(g.name for g in given if g.parameter is member) for member in group["params"]
        ]
        for group in optimizer.param_groups
    }
    assert found == {
        (2e-5, 2e-5, 0.1): ["w", "same"],
        (2e-5, 2e-5, 0.0): ["bias", "norm"],
        (1e-3, 1e-3, 0.1): ["head"],
    }
    assert optimizer.param_groups[0]["lr"] == 2e-5  # the policy's comes first: it is the one reported


def test_two_steps_by_hand() -> None:
    beta1, beta2, eps, rate, decay = 0.9, 0.99, 1e-4, 0.01, 0.1
    given = [parameter("w", [[2.0]]), parameter("b", [2.0])]
    optimizer = adamw(learning_rate=rate, weight_decay=decay, beta1=beta1, beta2=beta2, eps=eps).build(given)
    expected = {"w": 2.0, "b": 2.0}
    m = v = 0.0
    for t, gradient in ((1, 0.5), (2, -0.2)):
        for one in given:
            one.parameter.grad = torch.full_like(one.parameter, gradient)
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        step = rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
        expected["w"] = expected["w"] * (1 - rate * decay) - step  # decoupled: the decay isn't in the moments
        expected["b"] = expected["b"] - step
        for one in given:
            assert float(one.parameter.detach()) == pytest.approx(expected[one.name], rel=3e-7)  # float32's 2^-23


def test_the_norm_to_clip_to_is_an_option() -> None:
    assert adamw().max_norm == 1.0 and adamw(max_norm=None).max_norm is None and adamw(max_norm=0.3).max_norm == 0.3
