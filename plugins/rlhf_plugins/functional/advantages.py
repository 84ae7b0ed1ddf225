"""Advantages with a critic: GAE over ragged responses, whitening, and how much of the return the critic explains.

Returns are taken *before* whitening: the critic learns the rewards' own scale.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import at_least_float32, check_ragged, check_same_length, own_tokens, pad, unpad


@attrs.frozen(eq=False)
class Gae:
    """What `gae` returns; score units; 0 where masked."""

    advantages: Tensor  # [N]
    returns: Tensor  # [N], advantages + values: the lambda-return, the critic's target


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float, mask: Tensor | None = None) -> Gae:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V.

    Source: Schulman et al. 2015 (arXiv:1506.02438), equations 12 and 16. V and A are zero after the last token: a
    response ends its episode, so a truncated one must have been given its penalty in the score.

    rewards, values: [N], score units. lengths: int64 [B]. gamma, lam: per own token, in [0, 1]. mask: bool [N]; t+1 is
    the next *own* token, so credit crosses tool and environment tokens undecayed and the result is GAE on the response
    with those tokens cut out. (Zero V and r there instead is exact only at gamma = lam = 1.) Rewards and values at
    masked positions are not read: a reward belongs on the own token that earned it, where `penalised_rewards` puts it.
    The result carries no gradient, and half-precision input is computed and returned in float32.

    Raises: ValueError if a shape differs, or gamma or lam is outside [0, 1].
    """
    check_ragged(lengths, rewards=rewards, values=values)
    own_flat = own_tokens(mask, rewards)
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"expected gamma and lam in [0, 1], given gamma={gamma}, lam={lam}")
    with torch.no_grad():
        rewards, values = at_least_float32(rewards), at_least_float32(values)
        r = pad(rewards, lengths, 0.0)  # [B, T]
        v = pad(values, lengths, 0.0)  # [B, T]
        own = pad(own_flat, lengths, False)  # [B, T]
        padded = torch.zeros_like(r)  # [B, T], advantages
        next_value = r.new_zeros(r.shape[0])  # [B], V of the next own token
        next_advantage = r.new_zeros(r.shape[0])  # [B], A of the next own token
        for t in reversed(range(r.shape[1])):
            delta = r[:, t] + gamma * next_value - v[:, t]  # [B]
            advantage = delta + gamma * lam * next_advantage  # [B]
            padded[:, t] = torch.where(own[:, t], advantage, 0.0)
            next_advantage = torch.where(own[:, t], advantage, next_advantage)
            next_value = torch.where(own[:, t], v[:, t], next_value)
        advantages = unpad(padded, lengths)  # [N]
        return Gae(advantages=advantages, returns=torch.where(own_flat, advantages + values, 0.0))


@attrs.frozen(eq=False)
class Moments:
    """Sums over own tokens, so that the whole batch's are the element-wise sum of every rank's.

    float64, for `total_sq / count - mean^2` cancels.
    """

    count: Tensor  # [], tokens
    total: Tensor  # [], unit of x
    total_sq: Tensor  # [], unit of x, squared

    def stack(self) -> Tensor:
        """[3] float64: what to all-reduce with a sum."""
        return torch.stack([self.count, self.total, self.total_sq])

    @classmethod
    def unstack(cls, summed: Tensor) -> Moments:
        """From [3], the inverse of `stack`. Raises: ValueError if it is not [3]."""
        if summed.shape != (3,):
            raise ValueError(f"expected [3], given {list(summed.shape)}")
        return cls(count=summed[0], total=summed[1], total_sq=summed[2])

    @property
    def mean(self) -> Tensor:
        """[], unit of x. Divided by all counted tokens: every token weighs the same. 0 if there are none."""
        return self.total / self.count.clamp(min=1.0)

    @property
    def var(self) -> Tensor:
        """[], unit of x squared. Divided by count, not count - 1: the spread of this very batch, not a population's."""
        return (self.total_sq / self.count.clamp(min=1.0) - self.mean.square()).clamp(min=0.0)


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Count, sum and sum of squares of x over own tokens. x: [N]; mask: bool [N].

    Raises: ValueError if x is not [N] or the mask does not fit it.
    """
    check_same_length(x=x)
    own = own_tokens(mask, x)
    kept = torch.where(own, x, 0.0).double()  # [N]
    return Moments(count=own.sum().double(), total=kept.sum(), total_sq=kept.square().sum())


def whiten_with(
    x: Tensor, stats: Moments, mask: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """(x - mean) * rsqrt(var + eps), plus the mean again without `shift_mean`: [N] -> [N], 0 where masked.

    stats: of the whole batch over all ranks, so that every rank whitens alike. eps: unit of x squared; it keeps a
    constant batch at 0 rather than 0/0.
    Raises: ValueError if x is not [N], the mask does not fit it, or eps is not positive.
    """
    check_same_length(x=x)
    own = own_tokens(mask, x)
    if not eps > 0:
        raise ValueError(f"expected eps > 0, given {eps}")
    kept = torch.where(own, x, 0.0).double()  # [N]
    white = (kept - stats.mean) * torch.rsqrt(stats.var + eps)
    if not shift_mean:
        white = white + stats.mean
    return torch.where(own, white, 0.0).to(x.dtype)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Unit (biased) variance over own tokens, and zero mean unless `shift_mean` is False: [N] -> [N], 0 where masked.

    Source: `whiten` of openai/lm-human-preferences, described in Huang et al. 2024, "The N Implementation Details of
    RLHF with PPO", https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/ :
    advantages lose their mean, rewards keep it. For more than one rank: `moments`, all-reduce, `whiten_with`.

    Raises: as `whiten_with`.
    """
    return whiten_with(x, moments(x, mask), mask, shift_mean, eps)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over own tokens: [N], [N] -> [] float64, unitless.

    1: the critic predicts every return; 0: no better than a constant; below 0: worse. NaN where the returns do not vary
    (or there are none): the fraction of nothing. Both variances divide by the same count, which cancels; a constant
    offset of the critic is forgiven, as in `explained_variance` of openai/baselines.

    Raises: ValueError if the shapes differ or the mask does not fit.
    """
    check_same_length(values=values, returns=returns)
    own = own_tokens(mask, returns)
    with torch.no_grad():
        target = returns[own].double()  # [own tokens]
        error = target - values[own].double()
        if target.numel() == 0:
            return target.new_tensor(float("nan"))
        return explained_by(moments(target - target.mean()), moments(error - error.mean()), target.mean())


def explained_by(target: Moments, error: Moments, size: Tensor) -> Tensor:
    """The same of moments, so of all ranks: of the returns, and of returns - values. [] float64.

    Both must be taken about their means over all ranks, or about something near: they are subtracted from their own
    squares. size: [], that mean of the returns: a spread below its rounding is none.
    """
    none = bool(target.count == 0) or bool(target.var.sqrt() <= 1e-12 * size.abs())
    return target.var.new_tensor(float("nan")) if none else 1.0 - error.var / target.var
