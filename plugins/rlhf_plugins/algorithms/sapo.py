"""Soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347).

    L = mean_i mean_t -(4 / tau) sigmoid(tau (rho - 1)) A_i      rho = pi(y_t) / pi_old(y_t);  A as in GRPO
        tau: one for A > 0, a higher one for the rest, whose gradients raise every other token of the vocabulary

A smooth gate in place of a clip: at rho = 1 the gradient is GRPO's, and it fades to both sides. Where the engine isn't
exact, a token's loss is multiplied by its importance weight (`batch.importance`). Left out: nothing of the objective.

    rlhf run --algo sapo
"""

from __future__ import annotations

from torch import Tensor

from rlhf.api import Batch, Score
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import SAPOConfig
from rlhf_plugins.functional.shapes import sapo_loss


class SAPO(Grouped):
    config: SAPOConfig

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        advantages = batch.per_token("advantages")
        actor = sapo_loss(policy.logp, batch["logp_old"], advantages, config.tau_pos, config.tau_neg, batch.mask)
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, pieces.response_mean)
