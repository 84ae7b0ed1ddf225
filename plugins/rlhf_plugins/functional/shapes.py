"""Ratios of whole responses, and what takes the place of PPO's clip: losses per token, nothing averaged here.

Common to all: log-probs are flat [N], nats, at the sampling temperature; advantages [N]; mask bool [N], and a masked
token has a gradient of exactly zero, whatever its log-probs hold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_plugins.functional.ppo import PolicyLoss
from rlhf_plugins.functional.ragged import check_same_length, own_tokens, repeat, segment_sum


def response_log_ratio(
    logp: Tensor, logp_old: Tensor, lengths: Tensor, mask: Tensor | None = None, mean: bool = True
) -> Tensor:
    """The log-ratio of each token's response, on each of its tokens: [N] -> [N], nats.

    The value is the mean over the response's own tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071), or their
    sum. The gradient goes to the token's own log-prob alone: sg[s] + logp - sg[logp], their GSPO-token, so
    that a token can be weighed or left out; over all tokens of a response it is n times that of the mean.
    """
    check_same_length(logp=logp, logp_old=logp_old)
    own = own_tokens(mask, logp)
    difference = torch.where(own, logp - logp_old, 0.0)
    total = segment_sum(difference.detach(), lengths)  # [B]
    if mean:
        total = total / segment_sum(own, lengths).clamp(min=1)  # by the response's own tokens
    return torch.where(own, repeat(total, lengths) + difference - difference.detach(), 0.0)


def cispo_loss(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, cap: float, mask: Tensor | None = None
) -> PolicyLoss:
    """-sg[min(rho, cap)] A logp, per token.

    Source: CISPO, MiniMax-M1 2025 (arXiv:2506.13585): the weight is clipped, so a token far off keeps a
    gradient, where PPO's clip takes it away. cap: the largest rho, not its distance from 1.
    Raises: ValueError if the shapes differ, the mask does not fit, or cap is not positive.
    """
    check_same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    own = own_tokens(mask, logp)
    if not cap > 0.0:
        raise ValueError(f"expected cap > 0, given {cap}")
    kept = torch.where(own, logp, 0.0)
    ratio = torch.exp(kept.detach() - torch.where(own, logp_old, 0.0))
    losses = -ratio.clamp(max=cap) * torch.where(own, advantages, 0.0) * kept
    return PolicyLoss(losses=losses, clipped=own & (ratio > cap), ratio=ratio)


def sapo_loss(
    logp: Tensor, logp_old: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float, mask: Tensor | None = None
) -> PolicyLoss:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, per token; tau is tau_pos where A > 0, else tau_neg.

    Source: SAPO, Gao et al. 2025 (arXiv:2511.20347). At rho = 1 its gradient is that of -A rho, and it
    fades smoothly to both sides; nothing is clipped.
    Raises: ValueError if the shapes differ, the mask does not fit, or a temperature is not positive.
    """
    check_same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    own = own_tokens(mask, logp)
    if not (tau_pos > 0.0 and tau_neg > 0.0):
        raise ValueError(f"expected temperatures > 0, given {tau_pos} and {tau_neg}")
    advantages = torch.where(own, advantages, 0.0)
    # e^20 is where the gate has long faded, and in float32 its slope is 0; e^89 would be inf, and the gradient NaN.
    ratio = torch.exp(torch.where(own, logp - logp_old, 0.0).clamp(max=20.0))
    tau = torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)  # [N]
    losses = -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * advantages
    return PolicyLoss(losses=losses, clipped=torch.zeros_like(own), ratio=ratio.detach())


def vespo_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    lengths: Tensor,
    powers: tuple[float, float],
    rates: tuple[float, float],
    mask: Tensor | None = None,
) -> PolicyLoss:
    """-sg[phi(W)] A logp, per token; phi(W) = W^k exp(lambda (1 - W)), W = exp of the sum of a response's log-ratios.

    Source: VESPO, Shen et al. 2026 (arXiv:2602.10693). phi is the density of a gamma distribution, scaled to be 1 at
    W = 1; it is highest at W = k / lambda and fades to 0 on both sides, so nothing is clipped and W needs no division
    by the length. advantages: [N], one number a response. powers, rates: k and lambda where A >= 0, and where A < 0.
    lengths: int64 [B].

    W is kept within exp(+-20), as the authors have it, which changes nothing that could be seen: phi is 0 there.
    `ratio` is the token's own.
    Raises: ValueError if the shapes differ, the mask does not fit, or a power or a rate is not positive.
    """
    check_same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    own = own_tokens(mask, logp)
    if not min(*powers, *rates) > 0.0:
        raise ValueError(f"expected powers and rates > 0, given {powers} and {rates}")
    advantages = torch.where(own, advantages, 0.0)
    log_w = response_log_ratio(logp.detach(), logp_old, lengths, mask, mean=False).clamp(-20.0, 20.0)  # [N]
    good = advantages >= 0
    power = torch.full_like(log_w, powers[1]).masked_fill(good, powers[0])
    rate = torch.full_like(log_w, rates[1]).masked_fill(good, rates[0])
    weight = torch.exp(power * log_w + rate * (1.0 - log_w.exp()))  # [N], phi, the same for all of a response
    losses = -weight * advantages * torch.where(own, logp, 0.0)
    ratio = torch.exp(torch.where(own, logp.detach() - logp_old, 0.0))
    return PolicyLoss(losses=losses, clipped=torch.zeros_like(own), ratio=ratio)


def dppo_loss(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    divergence: Literal["tv", "kl"],
    delta_low: float,
    delta_high: float,
    cap: float,
    mask: Tensor | None = None,
) -> PolicyLoss:
    """-sg[min(rho, cap)] A logp, per token; 0 where the token has gone too far in the direction that A pulls it.

    Source: DPPO, Qi et al. 2026 (arXiv:2602.04879), in its binary form: of the distribution at a token only what was
    sampled and all the rest are told apart. With p = pi(y_t), q = pi_old(y_t)

        tv: D = |p - q|        kl: D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))

    and a token is left out where A > 0, p > q and D > delta_high, or A <= 0, p < q and D > delta_low. A ratio says
    little of how far a distribution has moved: from .001 to .01 is ten times and nearly nothing, from .99 to .5 is half
    and a lot.

    cap: the largest rho, not its distance from 1.
    Raises: ValueError if the shapes differ, the mask does not fit, or a threshold or the cap is out of range.
    """
    check_same_length(logp=logp, logp_old=logp_old, advantages=advantages)
    own = own_tokens(mask, logp)
    if not (delta_low >= 0.0 and delta_high >= 0.0 and cap > 0.0):
        raise ValueError(f"expected deltas >= 0 and cap > 0, given {delta_low}, {delta_high} and {cap}")
    kept = torch.where(own, logp, 0.0)
    now, before = kept.detach(), torch.where(own, logp_old, 0.0)
    advantages = torch.where(own, advantages, 0.0)
    p, q = now.exp(), before.exp()
    if divergence == "tv":
        distance = (p - q).abs()
    else:
        rest_q, rest_p = (-torch.expm1(x).clamp(max=-_LEAST) for x in (before, now))  # 1 - q, 1 - p, never 0
        distance = q * (before - now) + rest_q * (rest_q.log() - rest_p.log())
    too_high = (advantages > 0) & (p > q) & (distance > delta_high)
    too_low = (advantages <= 0) & (p < q) & (distance > delta_low)
    left_out = own & (too_high | too_low)
    ratio = torch.exp(now - before)
    weight = ratio.clamp(max=cap)
    losses = torch.where(left_out, 0.0, -weight * advantages * kept)
    return PolicyLoss(losses=losses, clipped=left_out, ratio=ratio)


_LEAST = 1e-7
"""Of a probability whose logarithm is taken: that of a token which is sure leaves nothing for the rest."""
