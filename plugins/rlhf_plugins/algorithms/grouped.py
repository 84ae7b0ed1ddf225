"""What algorithms that compare the responses to one prompt do alike, up to the loss, which each says itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.api import Algorithm, Experience, Prompt, Rollouts, Sample, Score
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.without_critic_options import GroupConfig


class Grouped(Algorithm):
    """Groups are sampled, those without spread may be left out, and each response is compared with its group."""

    config: GroupConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return pieces.groups(prompts, self.config.group_size)

    def keep(self, rollouts: Rollouts) -> Tensor | None:
        return pieces.with_spread(rollouts, self.config)

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        return pieces.group_experience(rollouts, score, self.config, self.context)
