"""The backend of one process: clipping, steps that are skipped, weights by name, state that repeats to the bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from needs import ADAMW8BIT
from rlhf import checkpoint
from rlhf.errors import RunError
from rlhf.interfaces import Context, OptimizerStrategy, TrainedParameter
from rlhf.plan import Plan
from rlhf_plugins.backends.single import Single
from rlhf_plugins.optimizers import AdamW8bitConfig, AdamWConfig
from rlhf_plugins.optimizers.adamw import AdamW
from rlhf_plugins.optimizers.adamw8bit import AdamW8bit

CONTEXT = Context(plan=cast(Plan, None))


class SGD(OptimizerStrategy):
    """Steps that can be read off the parameters; the second parameter has a rate of its own."""

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def build(self, parameters: Any) -> torch.optim.Optimizer:
        rates = (0.5, 0.25)
        groups = [
            {"params": [p.parameter], "lr": rate, "base_lr": rate} for p, rate in zip(parameters, rates, strict=True)
        ]
        return torch.optim.SGD(groups)


class Container(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        policy, value = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(policy.weight, 1.0)
        nn.init.constant_(value.weight, 2.0)
        self.bodies = nn.ModuleDict({"policy": policy, "value": value})

    def forward(self, requests: Any) -> Any:
        return requests


def prepared(optimizer: OptimizerStrategy) -> tuple[Single, Container]:
    backend, container = Single(None, CONTEXT), Container()
    backend.device = "cpu"
    named = container.named_parameters()
    parameters = [TrainedParameter(name, parameter, name.split(".")[1], None) for name, parameter in named]
    backend.prepare(container, parameters, optimizer)
    return backend, container


def numbers(container: Container) -> list[float]:
    return [float(x) for parameter in container.parameters() for x in parameter.detach().flatten()]


def loss_of(container: Container, a: float, b: float, c: float) -> torch.Tensor:
    """Gradients a and b of the policy's weights, c of the value's."""
    policy, value = container.parameters()
    return (policy * torch.tensor([[a, b]])).sum() + (value * c).sum()


def test_gradients_are_scaled_down_to_the_norm_over_all_roles() -> None:
    backend, container = prepared(SGD(max_norm=6.5))
    backend.backward(loss_of(container, 1.0, 4.0, 6.0))
    backend.backward(loss_of(container, 2.0, 0.0, 6.0))  # micro-batches add up: 3, 4, 12, of norm 13
    result = backend.update(factor=0.1)
    assert result.grad_norm == 13.0  # of before clipping
    assert result.learning_rate == pytest.approx(0.05) and not result.skipped
    # torch divides by norm + 1e-6, hence the tolerance of 1e-6
    expected = [1 - 0.05 * 1.5, 1 - 0.05 * 2.0, 2 - 0.025 * 6.0]
    assert numbers(container) == pytest.approx(expected, abs=1e-6)
    assert all(parameter.grad is None for parameter in container.parameters())
    assert backend.update(factor=0.5).learning_rate == 0.25  # of the peak, not of the step before


@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_smaller_gradients_are_left_as_they_are(max_norm: float | None) -> None:
    backend, container = prepared(SGD(max_norm))
    backend.backward(loss_of(container, 3.0, 4.0, 12.0))
    assert backend.update(1.0).grad_norm == 13.0
    assert numbers(container) == [1 - 0.5 * 3, 1 - 0.5 * 4, 2 - 0.25 * 12]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_that_are_not_finite_change_nothing(bad: float, max_norm: float | None) -> None:
    backend, container = prepared(SGD(max_norm))
    backend.backward(loss_of(container, 1.0, bad, 1.0))
    result = backend.update(1.0)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert numbers(container) == [1.0, 1.0, 2.0]
    backend.backward(loss_of(container, 0.0, 0.0, 1.0))  # nothing of it is left for the next step
    assert backend.update(1.0).grad_norm == 1.0


def test_a_loss_without_gradient_is_no_error() -> None:
    backend, container = prepared(SGD(None))
    backend.backward(torch.tensor(1.0))
    assert backend.update(1.0).grad_norm == 0.0
    assert numbers(container) == [1.0, 1.0, 2.0]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(RunError, match="nothing is to be trained"):
        Single(None, CONTEXT).prepare(Container(), [], SGD(None))


def test_weights_are_a_modules_own_by_its_own_names() -> None:
    backend, _ = prepared(SGD(None))
    assert {name: tensor.tolist() for name, tensor in backend.weights("value")} == {"weight": [[2.0]]}
    assert [name for name, _ in backend.weights("nobody")] == []
    assert [name for name, _ in backend.weights("value", lambda name: name != "weight")] == []
    assert [name for name, _ in backend.weights("value", lambda name: name == "weight")] == ["weight"]


def adamw(fused: bool = True) -> OptimizerStrategy:
    class Plain(AdamW):
        def build(self, parameters: Any) -> torch.optim.Optimizer:
            optimizer = super().build(parameters)
            for group in optimizer.param_groups:
                group["fused"] = fused
            return optimizer

    return Plain(AdamWConfig(learning_rate=0.1, max_norm=None), CONTEXT)


def steps(backend: Single, container: Container, gradients: list[tuple[float, float, float]]) -> list[float]:
    for gradient in gradients:
        backend.backward(loss_of(container, *gradient))
        backend.update(1.0)
    return numbers(container)


FIRST = [(0.3, -1.0, 0.5), (0.1, 0.7, -0.2)]
THEN = [(-0.4, 0.2, 0.9), (0.6, 0.6, 0.1), (0.0, -0.3, 0.3)]


@pytest.mark.parametrize("fused", [True, False])
def test_steps_after_a_checkpoint_are_the_same_to_the_bit(tmp_path: Path, fused: bool) -> None:
    backend, container = prepared(adamw(fused))
    steps(backend, container, FIRST)
    folder = checkpoint.save(tmp_path, 2, {"backend": backend.state()})
    expected = steps(backend, container, THEN)

    resumed, its = prepared(adamw(fused))
    resumed.load_state(checkpoint.load(folder)["backend"])
    assert steps(resumed, its, THEN) == expected

    weights_only, other = prepared(adamw(fused))  # it is the moments that make the difference
    weights_only.load_state({**checkpoint.load(folder)["backend"], "optimizer": {}})
    assert steps(weights_only, other, THEN) != expected


@ADAMW8BIT
def test_so_are_those_with_moments_of_8_bits(tmp_path: Path) -> None:
    def one() -> tuple[Single, Container]:
        return prepared(AdamW8bit(AdamW8bitConfig(learning_rate=0.1, max_norm=None, min_size=1), CONTEXT))

    backend, container = one()
    steps(backend, container, FIRST)
    kept = backend.state()["optimizer"]
    assert all(moments["state1"].dtype == torch.uint8 for moments in kept.values())
    folder = checkpoint.save(tmp_path, 2, {"backend": backend.state()})
    expected = steps(backend, container, THEN)
    resumed, its = one()
    resumed.load_state(checkpoint.load(folder)["backend"])
    assert steps(resumed, its, THEN) == expected


def test_a_state_from_before_the_first_step_forgets_later_moments() -> None:
    backend, container = prepared(adamw())
    start = copy.deepcopy(backend.state())
    assert start["optimizer"] == {}
    once = steps(backend, container, FIRST)
    backend.load_state(start)
    assert numbers(container) == [1.0, 1.0, 2.0]
    assert steps(backend, container, FIRST) == once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this torch can use")
def test_the_step_counter_is_where_a_fused_kernel_reads_it(tmp_path: Path) -> None:
    backend, container = prepared(adamw())
    container.to("cuda")
    for parameter in container.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.update(1.0)
    folder = checkpoint.save(tmp_path, 1, {"backend": backend.state()})
    backend.load_state(checkpoint.load(folder)["backend"])
    for parameter in container.parameters():
        parameter.grad = torch.ones_like(parameter)
    backend.update(1.0)
    assert numbers(container) == pytest.approx([0.8, 0.8, 1.8], abs=1e-5)  # two steps of the rate, 0.1
