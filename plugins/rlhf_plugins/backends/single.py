"""One process: the container is called as it is, and gradients are whole."""

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
from rlhf_plugins.backends.steps import Steps


class Single(Backend):
    """The CPU, or the first GPU where there is one."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.world = World()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(
        self, container: nn.Module, parameters: Sequence[TrainedParameter], optimizer: OptimizerStrategy
    ) -> None:
        self._container = container
        self._steps = Steps(parameters, optimizer, self.scaler)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        scores: list[Scores] = self._container(requests)
        return scores

    def backward(self, loss: Tensor, last: bool = False) -> None:
        self._steps.backward(loss)

    def update(self, factor: float) -> StepResult:
        return self._steps.step(factor)

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        prefix = f"bodies.{module}."
        for name, tensor in self._container.state_dict().items():
            if name.startswith(prefix) and (only is None or only(name[len(prefix) :])):
                yield name[len(prefix) :], tensor

    def state(self) -> State:
        """See `Steps.state`."""
        return self._steps.state()

    def load_state(self, state: State) -> None:
        self._steps.load_state(state)
