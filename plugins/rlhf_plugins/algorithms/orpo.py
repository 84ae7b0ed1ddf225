"""Odds ratio preference optimisation (Hong et al. 2024, eq. 6 and 7): fine-tuning and preference in one, no reference.

    L = mean over pairs of - log pi(chosen) / n_chosen - lambda log sigmoid(o_chosen - o_rejected)
    o = log(p / (1 - p)), p = exp(log pi(y) / n): the odds of a completion's mean token

The first term is `sft`'s, averaged pair by pair as in the paper, so it starts from a base model. Left out: nothing of
the paper; its code computes the first term on the prompt too.

    rlhf run --algo orpo --model MODEL --data pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, PreferenceRow, Score, group_mean
from rlhf_plugins.algorithms.pairs import log_rewards, pair_examples, pair_logps
from rlhf_plugins.algorithms.preferences import ORPOConfig
from rlhf_plugins.functional.likelihood import log_odds, orpo, sft


class ORPO(Algorithm):
    config: ORPOConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        return pair_examples(row, codec)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        chosen, rejected, n_chosen, n_rejected = pair_logps(batch, score)  # [P] each
        ratio = orpo(chosen, rejected, n_chosen, n_rejected)  # [P]
        nll = sft(chosen, n_chosen)  # [P], nats a token
        log_rewards(batch, log_odds(chosen / n_chosen), log_odds(rejected / n_rejected))
        batch.log("loss/sft", group_mean(nll, batch))
        batch.log("loss/odds_ratio", group_mean(ratio, batch))
        return group_mean(nll + config.odds_coef * ratio, batch)  # divides by the step's pairs
