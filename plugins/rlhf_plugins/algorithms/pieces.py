"""What algorithms without a critic are put together from: sampling groups, their experience, means, regularisation.

Functions of what the interface hands over; each algorithm's file says which it takes. What is arithmetic alone is in
`rlhf_plugins.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.api import (
    Batch,
    Context,
    Experience,
    Prompt,
    Rollouts,
    Sample,
    Score,
    Scores,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from rlhf_plugins.algorithms.covariance import restrained
from rlhf_plugins.algorithms.without_critic_options import GroupConfig, GRPOConfig, RegularisedConfig
from rlhf_plugins.functional.advantages import Moments, moments, whiten_with
from rlhf_plugins.functional.groups import each_normalised, group_advantages, group_stats
from rlhf_plugins.functional.kl import ESTIMATORS, k1, k3
from rlhf_plugins.functional.ppo import PolicyLoss, clipped_policy_loss
from rlhf_plugins.functional.scores import length_penalty

Mean = Callable[[Tensor, Batch], Tensor]
"""[N] -> this micro-batch's part of a mean, a scalar."""


# Means


def response_mean(x: Tensor, batch: Batch) -> Tensor:
    """Mean over responses of each one's mean over its own tokens: a response weighs the same, however long, so a token
    of a long one weighs less. x: [N]."""
    own = sequence_sum(torch.ones_like(x), batch)  # [B]
    return sequence_mean(sequence_sum(x, batch) / own.clamp(min=1), batch)


def response_sum(x: Tensor, batch: Batch) -> Tensor:
    """Mean over responses of each one's sum over its own tokens. x: [N]."""
    return sequence_mean(sequence_sum(x, batch), batch)


def constant_mean(x: Tensor, batch: Batch, length: int) -> Tensor:
    """Sum over own tokens, divided by responses times a constant length: neither a response's length nor the batch's
    changes what a token weighs. x: [N]."""
    return response_sum(x, batch) / length


def mean_of(how: str, length: int = 0) -> Mean:
    """The mean called "token", "response", "sum" or "constant"."""
    means = {"token": token_mean, "response": response_mean, "sum": response_sum}
    return partial(constant_mean, length=length) if how == "constant" else means[how]


def longest(context: Context, given: int | None) -> int:
    """Tokens of a response at most: as given, else the engine's limit."""
    if given is None:
        engine = context.plan.engine
        given = int(getattr(engine.config if engine else None, "max_new_tokens", 0))
    return given


# Sampling and experience


def groups(prompts: Sequence[Prompt], size: int) -> list[Sample]:
    """`size` responses to each prompt."""
    return [Sample(prompt, count=size) for prompt in prompts]


def with_spread(rollouts: Rollouts, config: GroupConfig) -> Tensor | None:
    """Which rollouts are kept where `drop_flat` is asked for: bool [B], those of groups whose rewards aren't all equal.
    Judged by the rewards themselves, before a penalty or a KL."""
    return ~flat(rollouts.rewards, rollouts, config) if config.drop_flat else None


def flat(rewards: Tensor, rollouts: Rollouts, config: GroupConfig) -> Tensor:
    """Which groups have nothing to compare, bool [B]: their rewards are all equal, or, where each of several rewards is
    compared, every one that counts is. rewards: their sum, [B]."""
    group = rollouts.sequences.group
    if config.several == "sum":
        return group_stats(rewards, group).flat
    found = torch.ones_like(group, dtype=torch.bool)
    for name, part in rollouts.reward_parts.items():
        if rollouts.reward_weights[name] != 0:
            found &= group_stats(part, group).flat
    return found


def over_ranks(x: Tensor, context: Context, mask: Tensor | None = None) -> Moments:
    """Moments of the whole batch of all ranks, not this rank's part. x: [N] or [B]."""
    return Moments.unstack(context.world.sum(moments(x, mask).stack()))


def log_probs(rollouts: Rollouts, score: Score, context: Context, reference: bool) -> dict[str, Tensor]:
    """Tokens' fields `logp_old` and, with a reference, `logp_ref`, [N] nats; reports how far apart they are."""
    mask, metrics = rollouts.sequences.mask, context.metrics
    fields = {"logp_old": score.logp_old(rollouts)}
    metrics.mean("policy/entropy", -fields["logp_old"], mask)  # of the samples: unbiased where sampling isn't truncated
    if reference:
        fields["logp_ref"] = score(rollouts, "reference").logp
        kl = k1(fields["logp_old"], fields["logp_ref"])
        metrics.mean("kl/k1", kl, mask)
        metrics.mean("kl/k3", k3(fields["logp_old"], fields["logp_ref"]), mask)
        metrics.mean("kl/sequence", sequence_sum(kl, rollouts))
    return fields


def less_overlong(rollouts: Rollouts, config: GroupConfig, context: Context) -> Tensor:
    """Rewards less the soft overlong punishment, where there is a buffer. [B]"""
    if config.overlong_buffer == 0:
        return rollouts.rewards
    limit = longest(context, config.max_length)
    buffer = max(1, limit // 5) if config.overlong_buffer is None else config.overlong_buffer
    worst = config.overlong_penalty  # from limit - buffer tokens on falling evenly, all of it at the limit
    punished = length_penalty(rollouts.rewards, rollouts.lengths, limit - buffer, worst / buffer, cap=worst)
    context.metrics.mean("reward/overlong", punished - rollouts.rewards)
    return punished


def less_kl(rewards: Tensor, fields: dict[str, Tensor], rollouts: Rollouts, config: RegularisedConfig) -> Tensor:
    """Rewards less kl_coef times the response's KL, where that is `kl_in` the reward. [B] -> [B]"""
    if config.kl_coef == 0 or config.kl_in != "reward":
        return rewards
    kl = ESTIMATORS[config.kl_estimator](fields["logp_old"], fields["logp_ref"])  # [N]
    return rewards - config.kl_coef * sequence_sum(kl, rollouts).to(rewards.dtype)


def compare(rewards: Tensor, rollouts: Rollouts, config: GroupConfig, context: Context) -> Tensor:
    """Advantages within groups, [B], as `scale` and `several` say; reports the share of groups without spread."""
    group = rollouts.sequences.group
    context.metrics.mean("group/flat", flat(rewards, rollouts, config).double())
    context.metrics.mean("group/std", group_stats(rewards, group).std)
    if config.several == "each":
        summed = each_normalised(rollouts.reward_parts, rollouts.reward_weights, group)
        return whiten_with(summed, over_ranks(summed, context))
    batch = over_ranks(rewards, context) if config.scale == "batch" else None
    return group_advantages(rewards, group, scale=config.scale != "none", batch=batch)


def group_experience(rollouts: Rollouts, score: Score, config: GroupConfig, context: Context) -> Experience:
    """Fields `advantages` [B], `logp_old` [N] and, where there is a KL, `logp_ref` [N]."""
    fields = log_probs(rollouts, score, context, config.kl_coef > 0)
    rewards = less_kl(less_overlong(rollouts, config, context), fields, rollouts, config)
    return Experience(rollouts, fields, advantages=compare(rewards, rollouts, config, context))


# Loss


def report(batch: Batch, logp: Tensor, actor: PolicyLoss) -> None:
    """How far the policy has moved within the step. logp: [N], nats."""
    batch.log("policy/clip_fraction", token_mean(actor.clipped.float(), batch))
    batch.log("policy/ratio", token_mean(actor.ratio, batch))
    batch.log("policy/approx_kl", token_mean(k3(batch["logp_old"], logp.detach()), batch))


def clipped_objective(policy: Scores, batch: Batch, config: GRPOConfig, context: Context) -> Tensor:
    """The objective of GRPO and those that differ from it by what its options say: PPO's clip by token, a scalar."""
    low, high = (1.0, math.inf) if config.covariance == "kl" else (config.clip_low, config.clip_high)
    advantages = batch.per_token("advantages")  # [N]
    actor = clipped_policy_loss(policy.logp, batch["logp_old"], advantages, low, high, batch.mask)
    report(batch, policy.logp, actor)
    length = longest(context, config.max_length) if config.mean == "constant" else 0
    losses = restrained(actor.losses, policy.logp, batch, config)
    return objective(losses, policy, batch, config, mean_of(config.mean, length))


def objective(losses: Tensor, policy: Scores, batch: Batch, config: RegularisedConfig, mean: Mean) -> Tensor:
    """The policy's losses [N], the KL where that is `kl_in` the loss, and the entropy bonus: a scalar.

    Each token is multiplied by its importance weight: all of it is an expectation over what the policy samples, and the
    engine may have sampled from a slightly other distribution. The entropy is of the whole distribution at a token and
    is a mean over tokens.
    """
    policy_loss = mean(losses * batch.importance, batch)
    batch.log("policy/loss", policy_loss)
    loss = policy_loss
    if config.kl_coef > 0 and config.kl_in == "loss":
        loss = loss + config.kl_coef * mean(kl_losses(policy.logp, batch, config) * batch.importance, batch)
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * token_mean(policy.entropy, batch)
    return loss


def kl_losses(logp: Tensor, batch: Batch, config: RegularisedConfig) -> Tensor:
    """The KL estimate of each token, with gradient; times the ratio where `kl_correction` says so. [N] -> [N], nats"""
    own = batch.mask
    logp, logp_ref = torch.where(own, logp, 0.0), torch.where(own, batch["logp_ref"], 0.0)  # or inf * 0 would be NaN
    kl = ESTIMATORS[config.kl_estimator](logp, logp_ref)
    if config.kl_correction:
        kl = kl * torch.exp(logp - torch.where(own, batch["logp_old"], 0.0))
    return kl
