"""Group filtered policy optimisation (GFPO, Shrivastava et al. 2025, arXiv:2508.09726).

    of G responses to a prompt k are retained: the shortest, or those with the most reward a token
    A_i = (r_i - mean of those retained) / (their std + 1e-4)
    L as of GRPO, over those retained

What isn't learnt from can't be learnt: sampling more and learning from what is short keeps a policy short, where a mean
reward says nothing of length. Sampling costs more, the update less.

Which are left out is decided before advantages are computed, so they are in no mean and no forward. With `drop_flat` a
group is left out where those retained are all equal, and with `sampling_rounds` replaced by further prompts'. Where the
engine isn't exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Left out: the paper's adaptive variant, which retains more of groups that are harder.

    rlhf run --algo gfpo
    rlhf run --algo gfpo --algo.prefer efficient
"""

from __future__ import annotations

from torch import Tensor

from rlhf.api import Rollouts
from rlhf_plugins.algorithms import pieces
from rlhf_plugins.algorithms.grpo import GRPO
from rlhf_plugins.algorithms.without_critic_options import GFPOConfig
from rlhf_plugins.functional.groups import best_of_groups


class GFPO(GRPO):
    config: GFPOConfig

    def keep(self, rollouts: Rollouts) -> Tensor:
        lengths = rollouts.lengths.double()  # [B], tokens
        by_token = rollouts.rewards.double() / lengths.clamp(min=1)
        worth = -lengths if self.config.prefer == "short" else by_token
        retained = best_of_groups(worth, rollouts.sequences.group, self.config.retain)  # bool [B]
        rows = retained.nonzero().flatten()
        spread = pieces.with_spread(rollouts.select(rows), self.config)
        return retained if spread is None else retained.index_put((rows,), spread)
