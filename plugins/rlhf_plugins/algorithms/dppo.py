"""Divergence proximal policy optimization (DPPO, Qi et al. 2026, arXiv:2602.04879), in its binary forms.

    L = mean_t -sg[M_t min(rho, cap)] A log pi(y_t)      rho = pi(y_t) / pi_old(y_t);  A as in GRPO;  sg: no gradient
        M_t = 0 where A pulls the token on, and D(pi_old, pi) at the token is beyond delta already, else 1
        D: of two outcomes, the token sampled and any other; total variation or KL

PPO's clip bounds a ratio: rare tokens run into it at once, though the distribution has hardly moved, and likely ones
may lose half of their probability before they do. Here the distance itself is bounded. Means are over all tokens of the
step. Where the engine isn't exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Otherwise than in the paper: distances are from the trainer's policy at sampling time, not from the engine's. Left out:
D over the most likely tokens, which wants their log-probs from the engine.

    rlhf run --algo dppo --algo.minibatches 4
    rlhf run --algo dppo --algo.divergence kl
"""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor

from rlhf.api import Batch, Score, token_mean
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import DPPOConfig
from rlhf_plugins.functional.shapes import dppo_loss


class DPPO(Grouped):
    config: DPPOConfig

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        usual = 0.15 if config.divergence == "tv" else 0.05  # the paper's
        low, high = (usual if delta is None else delta for delta in (config.delta_low, config.delta_high))
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        advantages, divergence = batch.per_token("advantages"), cast(Literal["tv", "kl"], config.divergence)
        actor = dppo_loss(policy.logp, batch["logp_old"], advantages, divergence, low, high, config.cap, batch.mask)
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, token_mean)
