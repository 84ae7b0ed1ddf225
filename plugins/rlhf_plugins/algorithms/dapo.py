"""Decoupled clip and dynamic sampling policy optimization (DAPO, Yu et al. 2025, arXiv:2503.14476).

    r_i <- r_i + p(|y_i|)                     p: 0, then falling to -1 over the last `overlong_buffer` tokens
    A_i = (r_i - mean of its group) / (std of its group + 1e-4)
    L = mean_t max(-A_i rho, -A_i clip(rho, 1 - low, 1 + high)),    rho = pi(y_t) / pi_old(y_t),  high > low

Four changes to GRPO. Clip-higher: a token that is unlikely and good may grow by more, so the policy narrows less fast.
Dynamic sampling: a group whose rewards are all equal teaches nothing; further prompts take its place, so that a step
always has as many groups that do. A mean over all tokens of the step: a long response weighs more. A soft overlong
punishment: a response that runs into the limit is told so before it does. There is no KL.

Whether a group is flat is judged by the rewards as they are given, before the punishment. Where the engine isn't exact,
a token's loss is multiplied by its importance weight (`batch.importance`).

Otherwise than in the paper: sampling is bounded (`sampling_rounds`). Where the rounds run out, the step learns from the
groups that there are and `sampling/lacking` counts those that there aren't; where there are none, it learns nothing and
says so. Left out: the overlong filtering that the paper tries before its punishment.

    rlhf run --algo dapo
"""

from __future__ import annotations

from rlhf_plugins.algorithms.grpo import GRPO
from rlhf_plugins.algorithms.without_critic_options import DAPOConfig


class DAPO(GRPO):
    """All four changes are defaults of options that GRPO has, too."""

    config: DAPOConfig
