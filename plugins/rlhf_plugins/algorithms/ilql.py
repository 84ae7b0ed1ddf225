"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871), as trlX had it.

    y_t = r_t + gamma V(s_{t+1})                        r: the row's reward at its last token, else 0; V is 0 after it
    L = mean_t sum_i (Q_i(s_t, a_t) - y_t)^2            two Q heads
        + mean_t |tau - [Q < V]| (Q - V(s_t))^2         Q = min_i of the target heads, Polyak averages of the two
        + c_cql mean_t sum_i - log softmax(Q_i(s_t, .))[a_t]
        + c_awac mean_t - w_t log pi(a_t | s_t)         w = min(e^{awac_beta (Q - V)}, 100)

All heads are linear, on the policy's trunk, in one forward; those of the vocabulary's size are read in chunks, at
response tokens alone. Sampling shifted by the advantage, log pi + shift (Q - V), is what the saved model does: V is the
same for all tokens and drops out, and the Q heads are added to the vocabulary head as weights. So any engine can.

Left out: the min of the Q heads there (a sum of weights has their mean), trlX's hidden layer in the heads and its
standardised rewards, rewards inside a completion, and adapters. Held-out numbers are of the loss.

    rlhf run --algo ilql --model MODEL --data rewarded.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Codec, Example, RewardedRow, Score, token_mean
from rlhf_plugins.algorithms.offline_rl import ILQLConfig
from rlhf_plugins.functional.ilql import advantage_weights, expectile_loss, q_targets

_ROLES = ("policy", "value", "q1", "q2", "target_q1", "target_q2")


class ILQL(Algorithm):
    config: ILQLConfig

    def examples(self, row: RewardedRow, codec: Codec) -> Iterable[Example]:
        response = codec.response(row.completion, row.prompt)
        rewards = torch.zeros(len(response))
        rewards[-1] = row.reward
        yield Example(codec.prompt(row.prompt), response, token_fields={"reward": rewards})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy, value, q1, q2, t1, t2 = score.together(batch, *_ROLES)
        v, target = value.values, torch.minimum(t1.values, t2.values).detach()  # [N], reward units
        goal = q_targets(batch["reward"].to(v.dtype), v, batch.lengths.to(v.device), config.gamma, batch.mask)
        q_loss = token_mean((q1.values - goal).square() + (q2.values - goal).square(), batch)
        v_loss = token_mean(expectile_loss(target, v, config.tau), batch)
        cql = token_mean(-q1.logp - q2.logp, batch)
        awac = token_mean(-advantage_weights(target, v, config.awac_beta) * policy.logp, batch)
        for name, part in (("q/loss", q_loss), ("q/cql", cql), ("value/loss", v_loss), ("policy/loss", awac)):
            batch.log(name, part)
        batch.log("q/mean", token_mean(target, batch))
        batch.log("value/mean", token_mean(v, batch))
        return q_loss + v_loss + config.cql_coef * cql + config.awac_coef * awac
