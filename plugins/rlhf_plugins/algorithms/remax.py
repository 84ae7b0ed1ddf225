"""ReMax (Li et al. 2023, arXiv:2310.10505, algorithm 2).

    A = r(sampled response) - beta sum_t KL_t - r(greedy response to the same prompt)
    L = mean over responses of sum_t -A rho_t,    rho_t = pi(y_t) / pi_old(y_t), which is 1 at the first pass

The greedy response is one more sampling request and is not learnt from. Its baseline costs a decode and no memory, and
fits the prompt. Where the engine isn't exact, a token's loss is multiplied by its importance weight
(`batch.importance`).

Left out: the paper's discount of the KL over tokens. Added: several passes, with PPO's clip.

    rlhf run --algo remax
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.without_critic_options import RemaxConfig
from rlhf_plugins.functional.groups import less_baseline
from rlhf_plugins.functional.ppo import clipped_policy_loss


class Remax(Algorithm):
    config: RemaxConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [
            sample for prompt in prompts for sample in (Sample(prompt), Sample(prompt, greedy=True, tag="baseline"))
        ]

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        greedy = torch.tensor([tag == "baseline" for tag in rollouts.tags], dtype=torch.bool)
        self.context.metrics.mean("reward/greedy", rollouts.rewards, greedy)
        sampled = rollouts.select((~greedy).nonzero().flatten())
        fields = pieces.log_probs(sampled, score, self.context, self.config.kl_coef > 0)
        rewards = pieces.less_kl(sampled.rewards, fields, sampled, self.config)  # [B]
        baseline = rollouts.rewards[greedy], rollouts.sequences.group[greedy]
        return Experience(sampled, fields, advantages=less_baseline(rewards, sampled.sequences.group, *baseline))

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        policy = score(batch, "policy", entropy=config.entropy_coef > 0)
        advantages, clip = batch.per_token("advantages"), config.clip_range
        actor = clipped_policy_loss(policy.logp, batch["logp_old"], advantages, clip, clip, batch.mask)
        pieces.report(batch, policy.logp, actor)
        return pieces.objective(actor.losses, policy, batch, config, pieces.response_sum)
