"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8): completions that are good or bad, no pairs needed.

    x = sum_t [log pi(y_t) - log pi_ref(y_t)] of a completion
    z = max(0, mean over the minibatch of the same of mismatched ones: each prompt with the next row's completion)
    L = mean of w+ (1 - sigmoid(beta (x - z))) over the good and w- (1 - sigmoid(beta (z - x))) over the bad

z is of the whole minibatch, however it is cut and over however many ranks, under the weights as they are, without
gradient. It costs a forward of policy and reference; kl_baseline matched takes the mean x of the minibatch's own
completions instead (biased up on good ones, but free where a minibatch is one micro-batch), none takes 0. A mismatched
completion is cut where it would pass the minibatch's longest sequence. Held-out, z is of all held-out rows.
Preference pairs are taken apart. Left out: weights by how many rows are good, which are the user's to give.

    rlhf run --algo kto --model MODEL --data labelled.jsonl --mem lora
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlhf.api import (
    Algorithm,
    Batch,
    Codec,
    Example,
    Experience,
    LabelledRow,
    Score,
    Sequences,
    sequence_mean,
    sequence_sum,
)
from rlhf_plugins.algorithms.preferences import KTOConfig
from rlhf_plugins.functional.kto import kto


class KTO(Algorithm):
    config: KTOConfig

    def examples(self, row: LabelledRow, codec: Codec) -> Iterable[Example]:
        response = codec.response(row.completion, row.prompt)
        yield Example(codec.prompt(row.prompt), response, fields={"label": float(row.label)})

    def experience(self, rollouts: Experience, score: Score) -> Experience:
        logp_ref = sequence_sum(score(rollouts, "reference").logp, rollouts)  # [B], nats
        return Experience(rollouts, logp_ref=logp_ref)

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        found = torch.zeros(0)
        if self.config.kl_baseline == "matched":
            found = sequence_sum(score(minibatch, "policy").logp, minibatch) - minibatch["logp_ref"]  # [B], nats
        elif self.config.kl_baseline == "mismatched":
            others = self._mismatched(minibatch.sequences)
            log_ratios = score(others, "policy").logp - score(others, "reference").logp
            found = sequence_sum(log_ratios, Experience(others))
        sums = torch.tensor([float(found.sum()), len(found)], dtype=torch.float64)
        total, count = self.context.world.sum(sums).tolist()
        baseline = max(total / count, 0.0) if count else 0.0
        self.context.metrics.mean("kl/baseline", baseline)
        return Experience(minibatch, baseline=torch.full((len(minibatch),), baseline))

    def _mismatched(self, own: Sequences) -> Sequences:
        """Each prompt of this rank with the completion of the next row, of the minibatch on all ranks; of one of one
        row, none."""
        responses = own.tokens.split(own.lengths.tolist())
        longest = int(self.context.world.max(torch.tensor(max(own.total_lengths(), default=0))))
        everyones = self.context.world.gather([own.group.tolist(), list(responses)])
        of_row = {row: tokens for rows, tokens_of in everyones for row, tokens in zip(rows, tokens_of, strict=True)}
        order = sorted(of_row)
        following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        rows = own.group.tolist() if len(order) > 1 else []
        prompts = [own.prompts[i] for i in own.prompt_of.tolist()][: len(rows)]
        cut = [of_row[following[row]][: longest - len(p)] for row, p in zip(rows, prompts, strict=True)]
        return Sequences.of(prompts, cut, group=rows)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        x = sequence_sum(score(batch, "policy").logp, batch) - batch["logp_ref"]  # [B], nats
        good, baseline = batch["label"] > 0, batch["baseline"].to(x.dtype)
        losses = kto(x, good, baseline, config.beta, config.desirable_weight, config.undesirable_weight)  # [B]
        above = config.beta * (x - baseline)
        batch.log("reward/accuracy", sequence_mean(((above > 0) == good).float(), batch))
        batch.log("reward/margin", sequence_mean(torch.where(good, above, -above), batch))
        return sequence_mean(losses, batch)  # divides by the step's completions
