"""Proximal policy optimisation for language models (Schulman et al. 2017; Ziegler et al. 2019; Stiennon et al. 2020).

    r_t = - beta KL_t + [t is the last token] score            KL_t: an estimate of log pi_old - log pi_ref at token t
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1},   R_t = A_t + V_t
    L = mean_t max(-A rho, -A clip(rho, 1 - eps, 1 + eps))     rho = pi(y_t) / pi_old(y_t), after temperature
        + c_v mean_t 0.5 max((V - R)^2, (clip(V, V_old +- eps_v) - R)^2) - c_e mean_t H_t

Where the engine isn't exact, a token's policy loss is multiplied by its importance weight (`batch.importance`).
Means are over the optimiser step's own tokens. Details follow Huang et al., "The N implementation details of RLHF
with PPO": returns before whitening, value head started at zero, dropout off, a penalty where EOS is missing. Left
out: rewards of intermediate tokens, and a pretraining term.

    rlhf run --algo ppo
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import attrs
import torch
from torch import Tensor

from rlhf.api import Algorithm, Batch, Context, Experience, Rollouts, Score, State, policy_mean, token_mean
from rlhf_plugins.algorithms import PPOConfig
from rlhf_plugins.functional import advantages as adv
from rlhf_plugins.functional.kl import ESTIMATORS, adaptive_kl_coef, k1, k3, penalised_rewards
from rlhf_plugins.functional.ppo import clipped_policy_loss, clipped_value_loss
from rlhf_plugins.functional.ragged import segment_sum
from rlhf_plugins.functional.scores import (
    ScoreStats,
    clip_scores,
    eos_penalty,
    length_penalty,
    merge_stats,
    normalise_scores,
    update_stats,
)


class PPO(Algorithm):
    config: PPOConfig

    def __init__(self, config: PPOConfig, context: Context) -> None:
        super().__init__(config, context)
        self.kl_coef = config.kl_coef
        self._stats = ScoreStats()
        self._responses = 0  # of the step, over all ranks

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        config, metrics, mask = self.config, self.context.metrics, rollouts.sequences.mask
        logp_old = score.logp_old(rollouts)  # [N], nats
        values = score(rollouts, "value").values  # [N], reward units
        logp_ref = score(rollouts, "reference").logp if config.kl_coef > 0 else logp_old  # [N], nats
        estimator = ESTIMATORS[config.kl_estimator]
        shaped = penalised_rewards(
            self._shape(rollouts), logp_old, logp_ref, rollouts.lengths, self.kl_coef, estimator, mask
        )
        rewards = self._whiten(shaped.rewards, mask, shift_mean=False) if config.whiten_rewards else shaped.rewards
        estimate = adv.gae(rewards, values, rollouts.lengths, config.gamma, config.lam, mask)
        advantages = self._whiten(estimate.advantages, mask) if config.whiten_advantages else estimate.advantages

        self._responses = int(self.context.world.sum(torch.tensor(len(rollouts))))
        if config.kl_coef > 0:  # else there is no reference, and how far it is isn't known
            kl = k1(logp_old, logp_ref)
            metrics.mean("kl/k1", kl, mask)
            metrics.mean("kl/k3", k3(logp_old, logp_ref), mask)
            metrics.mean("kl/sequence", segment_sum(torch.where(mask, kl, 0.0), rollouts.lengths))
        metrics.mean("kl/coef", self.kl_coef)
        metrics.mean("policy/entropy", -logp_old, mask)  # of the samples: unbiased where sampling isn't truncated
        metrics.mean("value/mean", values, mask)
        metrics.mean("value/explained_variance", self._explained(values, estimate.returns, mask))
        return Experience(
            rollouts,
            tokens={
                "logp_old": logp_old,
                "values_old": values,
                "advantages": advantages,
                "returns": estimate.returns,  # before whitening
            },
        )

    def loss(self, batch: Batch, score: Score) -> Tensor:
        config = self.config
        warming = self.step < config.critic_warmup
        if warming:
            values = score(batch, "value").values  # [N]
        else:
            policy, value = score.together(batch, "policy", "value", entropy=config.entropy_coef > 0)
            values = value.values
        critic = clipped_value_loss(values, batch["values_old"], batch["returns"], config.value_clip_range, batch.mask)
        value_loss = token_mean(critic.losses, batch)  # divides by the step's own tokens, as all below
        batch.log("value/loss", value_loss)
        batch.log("value/clip_fraction", token_mean(critic.clipped.float(), batch))
        if warming:
            return config.value_coef * value_loss
        actor = clipped_policy_loss(
            policy.logp, batch["logp_old"], batch["advantages"], config.clip_range, config.clip_range, batch.mask
        )
        policy_loss = policy_mean(actor.losses, batch)  # weighted where the engine sampled from another distribution
        batch.log("policy/loss", policy_loss)
        batch.log("policy/clip_fraction", token_mean(actor.clipped.float(), batch))
        batch.log("policy/ratio", token_mean(actor.ratio, batch))
        batch.log("policy/approx_kl", token_mean(k3(batch["logp_old"], policy.logp.detach()), batch))
        loss = policy_loss + config.value_coef * value_loss
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * token_mean(policy.entropy, batch)
        return loss

    @property
    def mixes(self) -> bool:
        return self.step >= self.config.critic_warmup

    def minibatch_done(self, metrics: Mapping[str, float]) -> bool:
        target = self.config.target_kl
        return target is not None and metrics.get("policy/approx_kl", 0.0) > 1.5 * target

    def step_done(self, metrics: Mapping[str, float]) -> None:
        if self.config.kl_control == "adaptive":
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef, metrics["kl/sequence"], self.config.kl_target, self._responses, self.config.kl_horizon
            )

    def state(self) -> State:
        return {"kl_coef": self.kl_coef, "score_stats": attrs.asdict(self._stats)}

    def load_state(self, state: State) -> None:
        self.kl_coef = state["kl_coef"]
        self._stats = ScoreStats(**state["score_stats"])

    def _shape(self, rollouts: Rollouts) -> Tensor:
        """The scores that are learnt from, [B]: normalised, clipped, penalised. Metrics keep the raw ones."""
        config, scores = self.config, rollouts.rewards
        if config.normalise_rewards:
            own = update_stats(ScoreStats(), scores) if len(scores) else ScoreStats()
            for stats in self.context.world.gather(attrs.asdict(own)):
                self._stats = merge_stats(self._stats, ScoreStats(**stats))
            scores = normalise_scores(scores, self._stats)
        if config.reward_clip is not None:
            scores = clip_scores(scores, config.reward_clip)
        if config.missing_eos != "none":
            value = config.missing_eos_value
            if value is None:
                value = -1.0 if config.missing_eos == "replace" else 1.0
            mode = cast(Literal["replace", "subtract"], config.missing_eos)
            scores = eos_penalty(scores, rollouts.ended, mode, value)
        if config.length_threshold is not None:
            scores = length_penalty(scores, rollouts.lengths, config.length_threshold, config.length_penalty)
        return scores

    def _moments(self, x: Tensor, mask: Tensor) -> adv.Moments:
        """Of the whole batch of all ranks, not this rank's part."""
        return adv.Moments.unstack(self.context.world.sum(adv.moments(x, mask).stack()))

    def _whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        return adv.whiten_with(x, self._moments(x, mask), mask, shift_mean=shift_mean)

    def _explained(self, values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """`adv.explained_variance` of the whole batch of all ranks."""
        target, error = returns.double(), returns.double() - values.double()  # [N] each
        size = self._moments(target, mask).mean
        return adv.explained_by(
            self._moments(target - size, mask), self._moments(error - self._moments(error, mask).mean, mask), size
        )
