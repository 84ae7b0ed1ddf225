"""REINFORCE++ and its variant with a baseline (Hu et al. 2025, arXiv:2501.03262).

    r_t = -beta KL_t + [t is the last token] score,    A_t = r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
    A <- (A - mean) / std over all tokens of the batch, of all prompts
    L = mean_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps))      rho = pi(y_t) / pi_old(y_t), after temperature
    reinforce++-baseline: the score is first taken less the mean of its group's; the KL is k2, in the loss

One response a prompt and no critic: the batch is the baseline. The variant is for rewards whose level depends on the
prompt. Where the engine isn't exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Left out: clipping and normalising rewards; whitening does the latter's work.

    rlhf run --algo reinforce++
    rlhf run --algo reinforce++-baseline
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score, token_mean
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.without_critic_options import ReinforceConfig
from rlhf_plugins.functional.advantages import gae, whiten_with
from rlhf_plugins.functional.groups import group_advantages
from rlhf_plugins.functional.kl import ESTIMATORS, penalised_rewards
from rlhf_plugins.functional.ppo import clipped_policy_loss


class Reinforce(Algorithm):
    config: ReinforceConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return pieces.groups(prompts, self.config.group_size)

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        config, mask, lengths = self.config, rollouts.sequences.mask, rollouts.lengths
        fields = pieces.log_probs(rollouts, score, self.context, config.kl_coef > 0)
        scores = rollouts.rewards
        if config.group_size > 1:
            scores = group_advantages(scores, rollouts.sequences.group, scale=False)
        in_reward = config.kl_coef if config.kl_in == "reward" else 0.0
        logp_old, logp_ref = fields["logp_old"], fields.get("logp_ref", fields["logp_old"])
        estimator = ESTIMATORS[config.kl_estimator]
        rewards = penalised_rewards(scores, logp_old, logp_ref, lengths, in_reward, estimator, mask).rewards
        # Rewards to go are GAE's advantages with lambda 1 and a critic that says 0.
        to_go = gae(rewards, torch.zeros_like(rewards), lengths, config.gamma, 1.0, mask).advantages  # [N]
        fields["advantages"] = whiten_with(to_go, pieces.over_ranks(to_go, self.context, mask), mask)
        return Experience(rollouts, fields)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        actor = clipped_policy_loss(
            policy.logp, batch["logp_old"], batch["advantages"], config.clip_range, config.clip_range, batch.mask
        )
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, token_mean)
