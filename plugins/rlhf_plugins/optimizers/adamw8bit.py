"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes.

Both moments are unpacked to float32 for the step and packed again: of each block of 256 the largest magnitude is kept
in float32, and each number as the nearest of 256 values that are dense near zero. Groups and schedules are `adamw`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bitsandbytes.optim import AdamW8bit as Optimizer

from rlhf.api import Context, OptimizerStrategy, TrainedParameter, schedule
from rlhf_plugins.optimizers import AdamW8bitConfig
from rlhf_plugins.optimizers.adamw import groups


class AdamW8bit(OptimizerStrategy):
    """See the module."""

    config: AdamW8bitConfig

    def __init__(self, config: AdamW8bitConfig, context: Context) -> None:
        super().__init__(config, context)
        self.max_norm = config.max_norm

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        config = self.config
        made: torch.optim.Optimizer = Optimizer(
            groups(parameters, config),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            min_8bit_size=config.min_size,
        )
        return made

    def factor(self, step: int, steps: int) -> float:
        """As `adamw`'s."""
        return schedule(self.config.schedule, step, steps, self.config.warmup, self.config.min_ratio)
