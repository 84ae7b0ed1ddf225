"""CISPO (MiniMax-M1 2025, arXiv:2506.13585).

    L = mean_t -sg[min(rho, cap)] A log pi(y_t)        rho = pi(y_t) / pi_old(y_t);  A as in GRPO;  sg: no gradient

The weight is clipped, not the gradient: rare tokens that the first update makes much likelier ("however", "wait") are
what PPO's clip drops first, and here they go on being learnt. Means are over all tokens of the step. Where the engine
isn't exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Left out: a lower bound of the weight, which the paper sets so low that it does nothing. cap is the bound itself.

    rlhf run --algo cispo
"""

from __future__ import annotations

from torch import Tensor

from rlhf.api import Batch, Score, token_mean
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import CISPOConfig
from rlhf_plugins.functional.shapes import cispo_loss


class CISPO(Grouped):
    config: CISPOConfig

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        actor = cispo_loss(policy.logp, batch["logp_old"], batch.per_token("advantages"), config.cap, batch.mask)
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, token_mean)
