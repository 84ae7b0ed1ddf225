"""Rejection-sampling fine-tuning, or best of n (RAFT, Dong et al. 2023, arXiv:2304.06767, algorithm 1).

    for each prompt: n responses, of which the `keep` with the highest reward are kept, if it is at least `threshold`
    L = - (1/T) sum_t log pi(y_t | x, y_<t)        T: the step's tokens that are kept

Each step samples anew from the policy as it is. Log-probs are at the temperature of sampling: at another the policy
would grow sharper from step to step by that alone, whatever the reward says. Of equal rewards the first response is
kept. A group whose rewards are all equal says nothing and is left out (RAFT learns from it: `keep_flat`): where answers
are right or wrong, it may be wrong throughout. Metrics count what was flat, tied, below the threshold, and kept.

Left out: ranking over the whole batch instead of by prompt, and a KL to the model it started from.

    rlhf run --algo best-of-n
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.api import Algorithm, Batch, Experience, Prompt, Rollouts, Sample, Score, token_mean
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.samples import BestOfNConfig
from rlhf_plugins.functional.groups import best_of_groups, group_stats, tied_for_best


class BestOfN(Algorithm):
    config: BestOfNConfig

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return pieces.groups(prompts, self.config.group_size)

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        config, metrics = self.config, self.context.metrics
        rewards, group = rollouts.rewards, rollouts.sequences.group
        flat, best = group_stats(rewards, group).flat, best_of_groups(rewards, group, config.keep)
        kept = best if config.keep_flat else best & ~flat
        metrics.mean("group/flat", flat.double())  # every group has as many responses: a share of groups
        metrics.mean("group/tied", tied_for_best(rewards, group).double())
        if config.threshold is not None:
            enough = rewards >= config.threshold
            metrics.mean("group/below_threshold", (~enough).double(), kept)
            kept = kept & enough
        metrics.mean("group/kept", kept.double())
        metrics.mean("reward/kept", rewards, kept)
        return Experience(rollouts.select(kept.nonzero().flatten()))

    def loss(self, batch: Batch, score: Score) -> Tensor:
        logp = score(batch, "policy").logp  # [N], nats
        return token_mean(-logp, batch)  # divides by the step's kept tokens
