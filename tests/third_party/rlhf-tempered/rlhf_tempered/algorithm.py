"""Reward-weighted regression within a group: responses are imitated in proportion to the softmax of their rewards.

rlhf run --algo tempered
"""

import torch

from rlhf.api import Algorithm, Experience, Sample, token_mean


class Tempered(Algorithm):
    def requests(self, prompts):  # what to sample
        return [Sample(prompt, count=self.config.group_size) for prompt in prompts]

    def experience(self, rollouts, score):  # once a step; `score` is the policy's forward without gradient
        weights = torch.softmax(rollouts.rewards.view(-1, self.config.group_size) / self.config.temperature, dim=-1)
        return Experience(rollouts, weight=weights.flatten())  # [B], one a response

    def loss(self, batch, score):  # a micro-batch; `score` has gradients
        logp = score(batch, "policy").logp  # [N], response tokens, nats
        return token_mean(-batch.per_token("weight") * logp, batch)  # divides by the step's global token count
