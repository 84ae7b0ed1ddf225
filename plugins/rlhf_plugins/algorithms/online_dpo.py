"""Online DPO (Guo et al. 2024, arXiv:2402.04792): pairs of the policy's own responses, judged as they are made.

    for each prompt: n responses; the one with the highest reward is chosen, the one with the lowest rejected
    L = the loss of `dpo` on these pairs, any of its losses. The reference is the model that the run started from, or,
        iterative, the policy as it was after the last of each `renew_every` optimiser steps

A group whose rewards are all equal has no better one: it is left out and counted, and nothing is learnt from a step of
such groups alone. Of equal best (or worst) the first is taken. With n above two, pairs are further apart and fewer are
left out. Log-probs, the reference's too, are at the temperature of sampling.

A renewed reference is a model of its own, whole on each rank: not with adapters, whose base stays, nor sharded.

Left out: a judge that compares two responses instead of scoring each; the reward does.

    rlhf run --algo online-dpo
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score, sequence_sum
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.dpo import pair_loss, with_counterparts
from rlhf_plugins.algorithms.samples import OnlineDPOConfig
from rlhf_plugins.functional.groups import best_and_worst, group_stats


class OnlineDPO(Algorithm):
    config: OnlineDPOConfig
    unit = "group"

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return pieces.groups(prompts, self.config.group_size)

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        rewards, group, metrics = rollouts.rewards, rollouts.sequences.group, self.context.metrics
        metrics.mean("group/flat", group_stats(rewards, group).flat.double())
        rows = best_and_worst(rewards, group)  # [P, 2]
        metrics.mean("group/gap", rewards[rows[:, 0]] - rewards[rows[:, 1]])
        pairs = rollouts.select(rows.flatten())
        return Experience(pairs, logp_ref=sequence_sum(score(pairs, "reference").logp, pairs))  # [2 P], nats

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        return with_counterparts(minibatch, score, self.config, self.context.world)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return pair_loss(batch, score, self.config)
