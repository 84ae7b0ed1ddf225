"""Online policy mirror descent (Kimi k1.5, Kimi Team 2025, arXiv:2501.12599, section 2.3.2).

Each step wants the policy of the highest reward near the one that sampled, pi_old:

    max_pi E_pi[r] - tau KL(pi || pi_old)      solved by pi* = pi_old exp(r / tau) / Z

so that r = tau log Z + tau log(pi* / pi_old) for any response, whoever sampled it. The loss is that equation's error:

    L = 1 / (2 tau) mean_i (r_i - b_i - tau sum_t [log pi(y_t) - log pi_old(y_t)])^2
    b_i = tau log mean_j exp(r_j / tau)        over the responses to i's prompt; their mean reward with baseline "mean"

At pi = pi_old its gradient is -(r_i - b_i) grad log pi(y_i), the policy gradient with a baseline; 1 / (2 tau) keeps it
so for any tau. Later steps on the same responses are pulled back as the policy moves, where PPO clips. As tau grows,
b_i becomes the mean. A whole response is one action: its tokens' log-ratios are summed, and a long one weighs more.

Where the engine isn't exact, the gradient of a token's log-prob is multiplied by its importance weight
(`batch.importance`); the loss keeps its value.

Left out: a new optimiser for each step, and the sampling of prompts and the length reward of the same report.

    rlhf run --algo opmd
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score, sequence_mean, sequence_sum
from rlhf_opmd import OPMDConfig


class OPMD(Algorithm):
    config: OPMDConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [Sample(prompt, count=self.config.group_size) for prompt in prompts]

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        config = self.config
        logp_old = score.logp_old(rollouts)  # [N], nats
        rewards = rollouts.rewards.view(-1, config.group_size)  # [P, G], a prompt's responses side by side
        target = rewards - group_baseline(rewards, config.tau, config.baseline)  # [P, G]
        self.context.metrics.mean("policy/entropy", -logp_old, rollouts.sequences.mask)
        return Experience(rollouts, {"logp_old": logp_old}, target=target.flatten())

    def loss(self, batch: Batch, score: Score) -> Tensor:
        logp, tau = score(batch, "policy").logp, self.config.tau  # [N], nats
        moved = logp.detach() - batch["logp_old"] + batch.importance * (logp - logp.detach())  # [N]
        log_ratio = sequence_sum(moved, batch)  # [B], nats
        batch.log("policy/log_ratio", sequence_mean(log_ratio, batch))
        return sequence_mean((batch["target"] - tau * log_ratio).square() / (2 * tau), batch)


def group_baseline(rewards: Tensor, tau: float, kind: str) -> Tensor:
    """What a group's rewards are compared with, reward units: [P, G] -> [P, 1].

    partition: tau log(1/G sum_j exp(r_j / tau)); divided by G, as the mean over samples of pi_old estimates Z.
    mean: of the group's rewards, which k1.5 found to do as well.
    """
    if kind == "mean":
        return rewards.mean(-1, keepdim=True)
    return tau * (torch.logsumexp(rewards / tau, -1, keepdim=True) - math.log(rewards.shape[-1]))
