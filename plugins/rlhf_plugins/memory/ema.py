"""An exponential moving average of the trained weights, kept in float32:

    average <- decay average + (1 - decay) weights      after each optimiser step; at first, the weights themselves

It lags behind and shakes less: late in a run it is usually the better model (Polyak & Juditsky 1992; Izmailov et al.
2018, arXiv:1803.05407). The optimiser goes on with the weights; the average stands in for them where a model is
evaluated or saved. It costs 4 bytes a trained weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.api import Context, MemoryStrategy, State, TrainedParameter
from rlhf_plugins.memory import EmaConfig


class Ema(MemoryStrategy):
    """See the module."""

    config: EmaConfig

    def __init__(self, config: EmaConfig, context: Context) -> None:
        super().__init__(config, context)
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}  # float32, beside the parameter

    def settled(self, parameters: Sequence[TrainedParameter]) -> None:
        self._parameters = {trained.name: trained.parameter for trained in parameters}
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def stepped(self) -> None:
        for name, average in self._average.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - self.config.decay)

    def stand_in(self, purpose: Literal["evaluate", "save"]) -> contextlib.AbstractContextManager[Any] | None:
        wanted = {"evaluate": self.config.evaluate, "save": self.config.save}[purpose]
        return self._swapped() if wanted else None

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        weights = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._average[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = weights[name]

    def state(self) -> State:
        return {"average": dict(self._average)}

    def load_state(self, state: State) -> None:
        for name, average in self._average.items():
            average.copy_(state["average"][name])
