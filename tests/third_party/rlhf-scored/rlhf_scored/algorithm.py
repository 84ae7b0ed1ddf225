"""Advantage-weighted regression (Peng et al. 2019) on a fixed set of scored completions.

L = - mean_t w log pi(y_t) + mean_i (judge(x) - score)^2        w = min(exp((score - judge(x)) / temperature), cap)

rlhf run --algo scored --data scored.jsonl --model MODEL
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, Score, sequence_mean, token_mean
from rlhf_scored import ScoredConfig, ScoredRow


class Scored(Algorithm):
    config: ScoredConfig

    def examples(self, row: ScoredRow, codec: Codec) -> Iterable[Example]:
        prompt, response = codec.prompt(row.prompt), codec.response(row.completion, row.prompt)
        yield Example(prompt, response, fields={"score": row.score})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        policy, judge = score.together(batch, "policy", "judge")
        expected = judge.values[batch.lengths.cumsum(0) - batch.lengths]  # [B], at the prompt's end
        advantage = batch["score"] - expected  # [B]
        weight = (advantage.detach() / self.config.temperature).exp().clamp(max=self.config.max_weight)  # [B]
        batch.log("scored/weight", sequence_mean(weight, batch))
        per_token = weight.repeat_interleave(batch.lengths) * policy.logp  # [N]
        return token_mean(-per_token, batch) + sequence_mean(advantage.square(), batch)
