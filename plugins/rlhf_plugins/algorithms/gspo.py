"""Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071, eq. 5), and LUSPO (arXiv:2602.05261).

    s_i = exp(mean_t [log pi(y_t) - log pi_old(y_t)])           of response i: one ratio for all of its tokens
    L = mean_i max(-A_i s_i, -A_i clip(s_i, 1 - low, 1 + high)),        A_i as in GRPO
    luspo: L = mean_i |y_i| max(...): a long response isn't weighed less, token for token

A reward is given to a response, so is the ratio; a token's alone is noise, the more so in mixtures of experts. s_i
moves far less than a token's ratio, hence the narrow clip. The loss is written by token, with GSPO's gradient (their
GSPO-token), so that where the engine isn't exact a token is multiplied by its importance weight (`batch.importance`).

Left out: advantages of their own for tokens (GSPO-token).

    rlhf run --algo gspo
    rlhf run --algo luspo
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.api import Batch, Score
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import GSPOConfig
from rlhf_plugins.functional.ppo import clipped_policy_loss
from rlhf_plugins.functional.shapes import response_log_ratio


class GSPO(Grouped):
    config: GSPOConfig

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        lengths = batch.lengths.to(policy.logp.device)
        log_ratio = response_log_ratio(policy.logp, batch["logp_old"], lengths, batch.mask)  # [N]
        advantages, none = batch.per_token("advantages"), torch.zeros_like(log_ratio)
        actor = clipped_policy_loss(log_ratio, none, advantages, config.clip_low, config.clip_high, batch.mask)
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, pieces.mean_of(config.mean))
