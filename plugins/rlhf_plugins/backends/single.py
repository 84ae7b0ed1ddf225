"""One process: the container is called as it is, and gradients are whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.api import (
    Backend,
    Context,
    OptimizerStrategy,
    RunError,
    ScoreRequest,
    Scores,
    State,
    StepResult,
    TrainedParameter,
    World,
)


class Single(Backend):
    """The CPU, or the first GPU where there is one."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.world = World()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        if not parameters:
            raise RunError("nothing is to be trained: every parameter of every trainable role is frozen")
        self._container = container
        self._parameters = {trained.name: trained.parameter for trained in parameters}
        self._max_norm = optimizer.max_norm
        self._optimizer = optimizer.build(parameters)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        scores: list[Scores] = self._container(requests)
        return scores

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # a loss may be constant, such as that of a micro-batch without gradient
            loss.backward()

    def update(self, factor: float) -> StepResult:
        parameters = list(self._parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, self._max_norm if self._max_norm is not None else float("inf")
        )
        skipped = not bool(torch.isfinite(norm))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if not skipped:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(float(norm), float(self._optimizer.param_groups[0]["lr"]), skipped)

    def weights(self, module: str) -> Iterator[tuple[str, Tensor]]:
        prefix = f"bodies.{module}."
        for name, tensor in self._container.state_dict().items():
            if name.startswith(prefix):
                yield name[len(prefix) :], tensor

    def state(self) -> State:
        """Trained parameters and, by their names, what the optimiser keeps of each."""
        moments = {
            name: dict(self._optimizer.state[parameter])
            for name, parameter in self._parameters.items()
            if parameter in self._optimizer.state
        }
        return {"parameters": {name: p.detach() for name, p in self._parameters.items()}, "optimizer": moments}

    def load_state(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][name])
        names = {parameter: name for name, parameter in self._parameters.items()}
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            # Moments live beside their parameter; a step counter does where the kernel reads it, else on the CPU.
            counts_there = bool(group.get("fused") or group.get("capturable"))
            for parameter in group["params"]:
                if moments := state["optimizer"].get(names[parameter]):
                    self._optimizer.state[parameter] = {
                        key: value.to(parameter.device)
                        if isinstance(value, Tensor) and (value.ndim or counts_there)
                        else value
                        for key, value in moments.items()
                    }
