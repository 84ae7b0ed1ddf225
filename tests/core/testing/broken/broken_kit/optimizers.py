"""Optimisers, each with one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.api import OptimizerStrategy, TrainedParameter


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum, right in all."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["velocity"] = 0.5 * state.get("velocity", torch.zeros_like(parameter)) + parameter.grad
        parameter -= group["lr"] * state["velocity"]


class Plain(OptimizerStrategy):
    """With groups as they must be."""

    made: type[Momentum] = Momentum

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        groups = []
        for one in parameters:
            rate = one.learning_rate or self.config.learning_rate
            groups.append({"params": [one.parameter], "lr": rate, "base_lr": rate})
        return self.made(groups)


class NoBase(Plain):
    """Groups without the rate that the schedule multiplies."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        optimizer = super().build(parameters)
        for group in optimizer.param_groups:
            del group["base_lr"]
        return optimizer


class OneRate(Plain):
    """One rate for all roles."""

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        optimizer = super().build(parameters)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] = self.config.learning_rate
        return optimizer


class _Uphill(Momentum):
    def move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        parameter += group["lr"] * parameter.grad


class Uphill(Plain):
    """A sign is turned."""

    made = _Uphill


class _Fixed(Momentum):
    def move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        parameter -= 0.05 * parameter.grad


class FixedRate(Plain):
    """A rate of its own, whatever the schedule says."""

    made = _Fixed


class _Decaying(Momentum):
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter *= 1 - 0.1 * group["lr"]


class Decaying(Plain):
    """Decays what has no gradient, too."""

    made = _Decaying


class _Apart(Momentum):
    def __init__(self, groups: Any) -> None:
        super().__init__(groups)
        self.velocity: dict[int, torch.Tensor] = {}

    def move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        before = self.velocity.get(id(parameter), torch.zeros_like(parameter))
        self.velocity[id(parameter)] = 0.5 * before + parameter.grad
        parameter -= group["lr"] * self.velocity[id(parameter)]


class Apart(Plain):
    """Keeps its momentum where no checkpoint looks."""

    made = _Apart


class _Pickled(Momentum):
    def move(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        super().move(parameter, group)
        self.state[parameter]["history"] = {0.5}


class Pickled(Plain):
    """Keeps what no checkpoint can hold."""

    made = _Pickled


class Frozen(Plain):
    """A schedule of 0 throughout."""

    def factor(self, step: int, steps: int) -> float:
        return 0.0
