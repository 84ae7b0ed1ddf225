"""AdamW (Loshchilov & Hutter 2019) with the field's usual groups and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.api import Context, OptimizerStrategy, TrainedParameter, schedule
from rlhf_plugins.optimizers import AdamWConfig


class AdamW(OptimizerStrategy):
    """See the module."""

    config: AdamWConfig

    def __init__(self, config: AdamWConfig, context: Context) -> None:
        super().__init__(config, context)
        self.max_norm = config.max_norm

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            groups(parameters, config),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,  # one pass over memory instead of one for each operation; CPU and CUDA both have it
        )

    def factor(self, step: int, steps: int) -> float:
        """Linear warm-up from 1/warm-up steps to 1, then the schedule; the last step comes close to `min_ratio`."""
        return schedule(self.config.schedule, step, steps, self.config.warmup, self.config.min_ratio)


def groups(parameters: Sequence[TrainedParameter], config: AdamWConfig) -> list[dict[str, Any]]:
    """One for each learning rate, with and without decay."""
    found: dict[tuple[float, float], list[Any]] = {}
    for trained in parameters:
        rate = trained.learning_rate if trained.learning_rate is not None else config.learning_rate
        decay = config.weight_decay if trained.parameter.ndim > 1 else 0.0
        found.setdefault((rate, decay), []).append(trained.parameter)
    return [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), members in found.items()
    ]
