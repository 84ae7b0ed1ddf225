"""What parallel backends share: the ranks' meeting place, a device for each, and the container behind one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.api import Backend, Context, ScoreRequest, Scores, here, join


class RankedBackend(Backend):
    """Ranks that have met: gradients go through the default process group (nccl on GPUs, gloo on CPUs), everything
    else through `world`, over gloo. What derives from it wraps the container and makes the steps."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.place = here()
        self.device = "cpu"
        if torch.cuda.is_available():
            self.device = f"cuda:{self.place.local_rank}"
            torch.cuda.set_device(self.place.local_rank)
        self.world = join(self.place, "gloo" if self.device == "cpu" else "nccl", config.deadline)

    def forward(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        scores: list[Scores] = self._container(requests)
        return scores

    def weights(self, module: str, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
        prefix = f"bodies.{module}."
        for name, tensor in self._container.state_dict().items():
            if name.startswith(prefix) and (only is None or only(name[len(prefix) :])):
                yield name[len(prefix) :], tensor

    def close(self) -> None:
        self.world.close()

    _container: nn.Module
    """Set by `prepare`, wrapped as the backend needs it."""
