"""Backends of one process, each with one error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.api import (
    Backend,
    Context,
    OptimizerStrategy,
    ScoreRequest,
    Scores,
    State,
    StepResult,
    TrainedParameter,
    World,
)


class Plain(Backend):
    """Right in all."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.world, self.device = World(), "cpu"
        self.count = 0

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        self.container, self.named = container, {one.name: one.parameter for one in parameters}
        self.optimizer, self.max_norm = optimizer.build(parameters), optimizer.max_norm

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        scores: list[Scores] = self.container(requests)
        return scores

    def backward(self, loss: Tensor, last: bool = False) -> None:
        self.count += 1
        if loss.requires_grad:
            loss.backward()

    def norm(self, parameters: list[Tensor]) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_norm or float("inf"))

    def update(self, factor: float) -> StepResult:
        norm = self.norm(list(self.named.values()))
        skipped = not bool(norm.isfinite())
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if not skipped:
            self.optimizer.step()
        self.clear()
        return StepResult(float(norm), float(self.optimizer.param_groups[0]["lr"]), skipped)

    def clear(self) -> None:
        self.count = 0
        self.optimizer.zero_grad()

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.container.bodies[module].state_dict().items():
            if only is None or only(name):
                yield name, tensor

    def state(self) -> State:
        moments = {name: dict(self.optimizer.state[p]) for name, p in self.named.items() if p in self.optimizer.state}
        return {"weights": {name: p.detach() for name, p in self.named.items()}, "moments": moments}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(state["weights"][name])
                self.optimizer.state.pop(parameter, None)
                if name in state["moments"]:
                    self.optimizer.state[parameter] = state["moments"][name]


class Mean(Plain):
    """The mean over micro-batches."""

    def norm(self, parameters: list[Tensor]) -> Tensor:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.count
        return super().norm(parameters)


class EachClipped(Plain):
    """Clips each tensor by itself."""

    def norm(self, parameters: list[Tensor]) -> Tensor:
        return torch.stack([super(EachClipped, self).norm([parameter]) for parameter in parameters]).max()


class Keeping(Plain):
    """Never clears its gradients."""

    def clear(self) -> None:
        self.count = 0


class Applying(Plain):
    """Applies whatever comes."""

    def update(self, factor: float) -> StepResult:
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), float("inf"))
        self.optimizer.step()
        self.clear()
        return StepResult(float(norm), float(self.optimizer.param_groups[0]["base_lr"] * factor))


class Strict(Plain):
    """Counts on a gradient."""

    def backward(self, loss: Tensor, last: bool = False) -> None:
        loss.backward()


class Parameters(Plain):
    """Gives parameters, and no buffers."""

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.container.bodies[module].named_parameters():
            if only is None or only(name):
                yield name, tensor


class Everything(Plain):
    """Takes no notice of what is asked for."""

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        return super().weights(module)


class Forgetful(Plain):
    """Saves weights alone."""

    def state(self) -> State:
        return {**super().state(), "moments": {}}


class Turned(Plain):
    """Answers in its own order."""

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        return super().forward(sorted(requests, key=lambda request: request.role))


class Constant(Plain):
    """Steps at the base rate, whatever the factor."""

    def update(self, factor: float) -> StepResult:
        return super().update(1.0)
