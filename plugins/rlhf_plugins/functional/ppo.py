"""PPO's clipped losses, per token. Nothing is averaged here.

The caller sums over own tokens and divides by the own tokens of the whole optimiser step (over every micro-batch and
rank), so that each token weighs the same however the step was cut up.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import check_same_length, own_tokens


@attrs.frozen(eq=False)
class PolicyLoss:
    """What `clipped_policy_loss` returns, per token."""

    losses: Tensor  # [N], advantage units; 0 where masked
    clipped: Tensor  # [N] bool: the clipped branch is the larger, so the token has no gradient; False where masked
    ratio: Tensor  # [N], pi / pi_old; 1 where masked


def clipped_policy_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(logp - logp_old), per token.

    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7, negated for a minimiser; clip_high > clip_low is
    "clip-higher" of DAPO (Yu et al. 2025, arXiv:2503.14476). Not clipped, by design: rho < 1 - clip_low with A > 0 and
    rho > 1 + clip_high with A < 0, where the step back is wanted. So nothing bounds rho in the second case, and a
    log-ratio past 88 overflows float32: inf and NaN are left to be seen.

    logp: [N], nats, with gradient, and logp_old: [N], nats, both at the sampling temperature. advantages: [N].
    clip_low in [0, 1], clip_high >= 0: distance of rho from 1. mask: bool [N]; a masked token has a gradient of
    exactly zero, whatever its log-probs hold.

    Raises: ValueError if the shapes differ, the mask does not fit, or a clip is out of range.
    """
    check_same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    own = own_tokens(mask, logp)
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"expected 0 <= clip_low <= 1 and clip_high >= 0, given {clip_low} and {clip_high}")
    log_ratio = torch.where(own, logp - logp_old, 0.0)  # [N]; masked before exp, or inf * 0 would be NaN
    advantages = torch.where(own, advantages, 0.0)
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return PolicyLoss(losses=torch.maximum(unclipped, clipped), clipped=clipped > unclipped, ratio=ratio.detach())


@attrs.frozen(eq=False)
class ValueLoss:
    """What `clipped_value_loss` returns, per token."""

    losses: Tensor  # [N], score units squared; 0 where masked
    clipped: Tensor  # [N] bool: the clipped branch is the larger, so the token has no gradient; False where masked


def clipped_value_loss(
    values: Tensor, values_old: Tensor, returns: Tensor, clip: float | None, mask: Tensor | None = None
) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), per token; 0.5 (V - R)^2 if `clip` is None.

    Source: the value loss of openai/baselines `ppo2` and openai/lm-human-preferences; it is not in the PPO paper.

    values: [N], score units, with gradient. values_old: [N], the critic's at sampling. returns: [N], unwhitened.
    clip: score units, so it wants rescaling when the scores are; None for no clipping. mask: bool [N], as in
    `clipped_policy_loss`.

    Raises: ValueError if the shapes differ, the mask does not fit, or clip is not positive.
    """
    check_same_length(values=values, values_old=values_old, returns=returns)
    own = own_tokens(mask, values)
    if clip is not None and not clip > 0.0:
        raise ValueError(f"expected clip > 0 or None for no clipping, given {clip}")
    unclipped = 0.5 * torch.where(own, values - returns, 0.0).square()  # [N]
    if clip is None:
        return ValueLoss(losses=unclipped, clipped=torch.zeros_like(own))
    near_old = torch.clamp(values, values_old - clip, values_old + clip)
    clipped = 0.5 * torch.where(own, near_old - returns, 0.0).square()
    return ValueLoss(losses=torch.maximum(unclipped, clipped), clipped=clipped > unclipped)
