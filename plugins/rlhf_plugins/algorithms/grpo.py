"""Group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv:2402.03300, eq. 3), and Dr. GRPO (Liu et
al. 2025, arXiv:2503.20783, section 3.2).

    A_i = (r_i - mean of its group) / (std of its group + 1e-4)         the same for each token of response i
    L = mean_i mean_t max(-A_i rho, -A_i clip(rho, 1 - low, 1 + high))  rho = pi(y_t) / pi_old(y_t), after temperature
        + beta mean_i mean_t KL_t - c_e mean_t H_t
    dr-grpo: A_i = r_i - mean of its group;   L = 1 / (B max_length) sum_i sum_t ...

Dividing by the deviation favours prompts that are nearly always or nearly never solved; dividing by a response's length
favours short right and long wrong ones. Dr. GRPO does neither. `grpo` is as published but for the KL: beta is 0, which
is what the field came to, and needs no reference; give `--algo.kl-coef 0.04` for the paper's. Where the engine isn't
exact, a token's loss is multiplied by its importance weight (`batch.importance`).

Left out: rewards of intermediate steps (the paper's process supervision), a reference that is renewed in the run
(its iterative variant), and learning a reward model on the way.

    rlhf run --algo grpo
    rlhf run --algo dr-grpo
"""

from __future__ import annotations

from torch import Tensor

from rlhf.api import Batch, Experience, Score
from rlhf_plugins.algorithms import covariance, pieces
from rlhf_plugins.algorithms.grouped import Grouped
from rlhf_plugins.algorithms.without_critic_options import GRPOConfig


class GRPO(Grouped):
    config: GRPOConfig

    _update = (-1, 0)
    """The last optimiser step: the step, and which of that."""

    def prepare(self, minibatch: Experience, score: Score) -> Experience:
        step, nth = self._update
        self._update = (self.step, nth + 1 if step == self.step else 0)
        return covariance.prepared(minibatch, score, self.config, self.context, self._update)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        policy = score(batch, "policy", entropy=self.config.entropy_coef > 0)
        return pieces.clipped_objective(policy, batch, self.config, self.context)
