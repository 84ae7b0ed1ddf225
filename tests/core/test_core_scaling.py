"""The loss scale: its arithmetic by hand, and what a backend does with it."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn

from rlhf.errors import RunError
from rlhf.interfaces import Context, OptimizerStrategy, TrainedParameter
from rlhf.plan import Plan
from rlhf.scaling import LossScaler
from rlhf_plugins.backends.single import Single


def test_the_scale_halves_at_once_and_doubles_after_a_while() -> None:
    scaler = LossScaler(8.0, interval=3)
    seen = []
    for overflowed in (False, False, True, False, False, False, False, False, False, True):
        scaler.update(overflowed)
        seen.append(scaler.scale)
    #      2 clean steps, an overflow, 3 clean: doubled, 3 clean: doubled, an overflow
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16, 8]
    assert scaler.clean == 0


def test_nothing_is_left_to_halve() -> None:
    scaler = LossScaler(2.0)
    scaler.update(True)
    with pytest.raises(RunError, match="overflow in float16 even unscaled"):
        scaler.update(True)


def test_its_state_is_all_of_it() -> None:
    scaler, other = LossScaler(8.0, interval=3), LossScaler(64.0, interval=3)
    scaler.update(False)
    scaler.update(False)
    other.load_state(scaler.state())
    for one in (scaler, other):
        one.update(False)
    assert other.state() == scaler.state() == {"scale": 16.0, "clean": 0}


def test_a_power_of_two_changes_no_bit() -> None:
    weight = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    plain = torch.autograd.grad((weight.sin() * 0.3).sum(), weight)[0]
    scaler = LossScaler(2.0**16)
    scaler.scaled((weight.sin() * 0.3).sum()).backward()
    assert weight.grad is not None and not torch.equal(weight.grad, plain)
    scaler.unscale([weight, nn.Parameter(torch.ones(1))])  # one without gradient
    assert torch.equal(weight.grad, plain)


def test_what_overflowed_stays_so() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([math.inf, math.nan, 4.0])
    LossScaler(2.0).unscale([weight])
    assert weight.grad[0] == math.inf and math.isnan(weight.grad[1]) and weight.grad[2] == 2.0


def test_small_gradients_are_kept_that_float16_would_lose() -> None:
    """d loss / d y is 1e-9, below float16's smallest number, 6e-8; times 65536 it is 6.6e-5."""
    x = torch.tensor([[1.0, 2.0]])
    for scaler, expected in ((None, 0.0), (LossScaler(2.0**16), 2e-9)):
        layer = nn.Linear(2, 1, bias=False)
        with torch.autocast("cpu", torch.float16):
            loss = layer(x).float().sum() * 1e-9
        (scaler.scaled(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale(layer.parameters())
        assert layer.weight.grad is not None
        # float16 keeps 11 bits of 6.6e-5: 2^-11
        assert float(layer.weight.grad[0, 1]) == pytest.approx(expected, rel=2**-11)


class SGD(OptimizerStrategy):
    def build(self, parameters: Any) -> torch.optim.Optimizer:
        groups = [{"params": [p.parameter for p in parameters], "lr": 0.5, "base_lr": 0.5}]
        return torch.optim.SGD(groups)


def test_a_backend_leaves_the_step_out_and_goes_on() -> None:
    """2^127 x 4 overflows float32; 2^125 doesn't."""
    container = nn.Linear(1, 1, bias=False)
    nn.init.constant_(container.weight, 1.0)
    backend = Single(None, Context(plan=cast(Plan, None)))
    backend.scaler = LossScaler(2.0**127)
    backend.prepare(
        container, [TrainedParameter("weight", container.weight, "policy", None)], SGD(None, cast(Any, None))
    )
    found = []
    for _ in range(3):
        backend.backward(container(torch.tensor([[4.0]])).sum())
        found.append(backend.update(1.0))
    assert [result.skipped for result in found] == [True, True, False]
    assert [result.loss_scale for result in found] == [2.0**127, 2.0**126, 2.0**125]
    assert found[0].grad_norm == math.inf and found[2].grad_norm == 4.0  # the norm is of the unscaled gradient
    assert container.weight.item() == 1.0 - 0.5 * 4.0
    assert backend.state()["scaler"] == {"scale": 2.0**125, "clean": 1}
    backend.scaler.update(True)
    backend.load_state({**backend.state(), "scaler": {"scale": 4.0, "clean": 2}})
    assert backend.scaler.state() == {"scale": 4.0, "clean": 2}
