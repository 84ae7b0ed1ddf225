"""Reward modelling on preference pairs (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    L = - log sigmoid(r(x, chosen) - r(x, rejected) - margin) + c (r(x, chosen) + r(x, rejected))^2, averaged over pairs

r is a scalar head read at the last token (EOS included), started at N(0, 1/sqrt(d+1)). Left out: K-wise rankings (pairs
of them are), and a language-model term.

    rlhf run --algo reward --model MODEL --data pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, PreferenceRow, Score, group_mean
from rlhf_plugins.algorithms import RewardConfig
from rlhf_plugins.functional.preference import bradley_terry


class RewardModelling(Algorithm):
    config: RewardConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        prompt = codec.prompt(row.prompt)
        margin = row.margin if row.margin is not None and self.config.use_margin else 0.0
        for text in (row.chosen, row.rejected):
            yield Example(prompt, codec.response(text, row.prompt), fields={"margin": margin})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        chosen, rejected = score(batch, "reward").score.view(-1, 2).unbind(1)  # [P] each, reward units
        margin = batch["margin"].view(-1, 2)[:, 0]  # [P]
        losses = bradley_terry(chosen, rejected, margin, self.config.centre_coef)  # [P]
        batch.log("reward/accuracy", group_mean((chosen > rejected).float(), batch))
        batch.log("reward/margin", group_mean(chosen - rejected, batch))
        batch.log("reward/chosen", group_mean(chosen, batch))
        batch.log("reward/rejected", group_mean(rejected, batch))
        return group_mean(losses, batch)  # divides by the step's pairs
