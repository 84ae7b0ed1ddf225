"""Simple preference optimisation (Meng et al. 2024, eq. 6): no reference, and lengths don't count.

    L = mean over pairs of - log sigmoid(beta log pi(chosen) / n_chosen - beta log pi(rejected) / n_rejected - gamma)
        + c mean over pairs of - log pi(chosen) / n_chosen          c = sft_coef, 0 in the paper

log pi is summed over a completion's n tokens. Nothing holds the policy where it started but a small learning rate:
with sft_coef above 0 the chosen completions do. Left out: the losses other than the sigmoid's, and label smoothing.

    rlhf run --algo simpo --model MODEL --data pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, PreferenceRow, Score, group_mean
from rlhf_plugins.algorithms.pairs import log_rewards, pair_examples, pair_logps
from rlhf_plugins.algorithms.preferences import SimPOConfig
from rlhf_plugins.functional.likelihood import sft, simpo


class SimPO(Algorithm):
    config: SimPOConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        return pair_examples(row, codec)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        chosen, rejected, n_chosen, n_rejected = pair_logps(batch, score)  # [P] each
        losses = simpo(chosen, rejected, n_chosen, n_rejected, config.beta, config.gamma)  # [P]
        if config.sft_coef:
            losses = losses + config.sft_coef * sft(chosen, n_chosen)
        log_rewards(batch, config.beta * chosen / n_chosen, config.beta * rejected / n_rejected)
        return group_mean(losses, batch)  # divides by the step's pairs
