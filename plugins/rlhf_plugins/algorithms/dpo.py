"""Direct preference optimisation (Rafailov et al. 2023, eq. 7), with IPO (Azar et al. 2023, eq. 17) and hinge.

    c, r = sum_t [log pi(y_t) - log pi_ref(y_t)] of the chosen and the rejected completion
    sigmoid: - log sigmoid(beta (c - r))     hinge: relu(1 - beta (c - r))     ipo: (c/|c| - r/|r| - 1/(2 beta))^2

The reference's log-probs are computed once a pair and kept; with adapters the reference is the policy without them.
Left out: the rest of the family's losses (robust, exo, nca, ...), and losses that need no reference.

    rlhf run --algo dpo --model MODEL --data pairs.jsonl --mem lora
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, Experience, PreferenceRow, Score, group_mean, sequence_sum
from rlhf_plugins.algorithms import DPOConfig
from rlhf_plugins.functional.preference import LOSSES


class DPO(Algorithm):
    config: DPOConfig
    unit = "group"

    def examples(self, row: PreferenceRow, codec: Codec) -> Iterable[Example]:
        prompt = codec.prompt(row.prompt)
        for text in (row.chosen, row.rejected):
            yield Example(prompt, codec.response(text, row.prompt))

    def experience(self, rollouts: Experience, score: Score) -> Experience:
        logp_ref = sequence_sum(score(rollouts, "reference").logp, rollouts)  # [B], nats
        return Experience(rollouts, logp_ref=logp_ref)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        logp = sequence_sum(score(batch, "policy").logp, batch)  # [B], nats
        c, r = (logp - batch["logp_ref"]).view(-1, 2).unbind(1)  # [P] each, log-ratios
        n_chosen, n_rejected = batch.lengths.to(logp.device).view(-1, 2).unbind(1)  # [P] each, tokens
        losses = LOSSES[config.loss](c, r, config.beta, n_chosen, n_rejected, config.label_smoothing)  # [P]
        batch.log("reward/accuracy", group_mean((c > r).float(), batch))
        batch.log("reward/margin", group_mean(config.beta * (c - r), batch))
        batch.log("reward/chosen", group_mean(config.beta * c, batch))
        batch.log("reward/rejected", group_mean(config.beta * r, batch))
        return group_mean(losses, batch)  # divides by the step's pairs
