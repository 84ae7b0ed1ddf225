"""Variational sequence-level soft policy optimization (VESPO, Shen et al. 2026, arXiv:2602.10693).

    W_i = exp(sum_t [log pi(y_t) - log pi_old(y_t)])                of response i, divided by no length
    L = mean_t -sg[phi(W_i)] A_i log pi(y_t)                        A as in GRPO;  sg: no gradient
        phi(W) = W^k exp(lambda (1 - W)),  k and lambda by the sign of A_i

A response's ratio is what importance sampling asks for, and it varies wildly. The paper asks for the weight that is
nearest to it at a bounded variance, and finds one that fades smoothly to both sides: no clip, no division by length.
What has gone where it was pulled is weighed least: a good response that became likelier, a bad one that became less
likely. Means are over all tokens of the step.

Where the engine isn't exact, a token's loss is multiplied by its importance weight (`batch.importance`). Otherwise than
in the paper: there that difference is part of W.

    rlhf run --algo vespo --algo.minibatches 4
"""

from __future__ import annotations

from torch import Tensor

from rlhf.api import Batch, Score, token_mean
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import VESPOConfig
from rlhf_plugins.functional.shapes import vespo_loss


class VESPO(Grouped):
    config: VESPOConfig

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        actor = vespo_loss(
            policy.logp,
            batch["logp_old"],
            batch.per_token("advantages"),
            batch.lengths.to(policy.logp.device),
            powers=(config.power_pos, config.power_neg),
            rates=(config.rate_pos, config.rate_neg),
            mask=batch.mask,
        )
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, token_mean)
