"""A cost for length.

    score = max(min, -slope * |n - target|)             side = both
    score = max(min, -slope * max(0, n - target))       side = over

n is how many of the response's tokens are the policy's own, its closing token included; tool output is not counted.
With target 0 it is a plain price a token. Source: the length term of LCPO-Exact, Aggarwal & Welleck 2025,
arXiv:2503.04697, eq. 1; `min` is ours, so that one endless response does not outweigh the other rewards of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.api import Reward, Rollouts, Score, sequence_sum


class Length(Reward):
    """See the module."""

    def judge(self, rollouts: Rollouts, score: Score) -> Tensor:
        """float32 [B], at most 0."""
        ones = torch.ones(len(rollouts.sequences.tokens))  # [N]
        away = sequence_sum(ones, rollouts) - self.config.target  # [B], tokens
        away = away.abs() if self.config.side == "both" else away.clamp(min=0)
        worst = -torch.inf if self.config.min is None else self.config.min
        return torch.clamp(-self.config.slope * away, min=worst)
