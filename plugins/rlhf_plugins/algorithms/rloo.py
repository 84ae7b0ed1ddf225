"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740, section 2.3; Kool et al. 2019).

    r_i <- r_i - beta sum_t KL_t                                  KL_t: an estimate of log pi_old - log pi_ref
    A_i = r_i - mean of the other responses to the prompt
    L = mean_i sum_t max(-A_i rho_t, -A_i clip(rho_t, 1 - low, 1 + high)),   rho_t = pi(y_t) / pi_old(y_t)

A whole response is one action, so its tokens' losses are a sum, and a long response weighs more. At one pass and one
minibatch rho is 1, nothing is clipped, and the gradient is the paper's, -A_i grad log pi(y_i). Where the engine isn't
exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Left out: one ratio for the whole response, as TRL has it; it matters from the second pass on, and over hundreds of
tokens it is nearly always beyond its clip.

    rlhf run --algo rloo
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.without_critic_options import RLOOConfig
from rlhf_plugins.functional.groups import leave_one_out
from rlhf_plugins.functional.ppo import clipped_policy_loss


class RLOO(Algorithm):
    config: RLOOConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return pieces.groups(prompts, self.config.group_size)

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        config = self.config
        fields = pieces.log_probs(rollouts, score, self.context, config.kl_coef > 0)
        rewards = pieces.less_kl(rollouts.rewards, fields, rollouts, config)  # [B]
        return Experience(rollouts, fields, advantages=leave_one_out(rewards, rollouts.sequences.group))

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        advantages = batch.per_token("advantages")  # [N]
        actor = clipped_policy_loss(
            policy.logp, batch["logp_old"], advantages, config.clip_low, config.clip_high, batch.mask
        )
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, pieces.response_sum)
