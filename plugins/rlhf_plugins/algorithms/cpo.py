"""Contrastive preference optimisation (Xu et al. 2024): DPO with a flat reference, and the chosen completions learnt.

    L = mean over pairs of - log sigmoid(beta (log pi(chosen) - log pi(rejected))) - c log pi(chosen) / n_chosen

log pi is summed over a completion's n tokens, c is sft_coef. With label_smoothing eps, the first term is
-(1 - eps) log sigmoid(x) - eps log sigmoid(-x). Left out: hinge and IPO in place of the sigmoid (`dpo` has them), and
CPO-SimPO, which is `simpo` with an sft_coef.

    rlhf run --algo cpo --model MODEL --data pairs.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, PreferenceRow, Score, group_mean
from rlhf_plugins.algorithms.pairs import log_rewards, pair_examples, pair_logps
from rlhf_plugins.algorithms.preferences import CPOConfig
from rlhf_plugins.functional.likelihood import cpo, sft


class CPO(Algorithm):
    config: CPOConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        return pair_examples(row, codec)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        chosen, rejected, n_chosen, _ = pair_logps(batch, score)  # [P] each
        preference = cpo(chosen, rejected, config.beta, config.label_smoothing)  # [P]
        nll = sft(chosen, n_chosen)  # [P], nats a token
        log_rewards(batch, config.beta * chosen, config.beta * rejected)
        batch.log("loss/preference", group_mean(preference, batch))
        batch.log("loss/sft", group_mean(nll, batch))
        return group_mean(preference + config.sft_coef * nll, batch)  # divides by the step's pairs
