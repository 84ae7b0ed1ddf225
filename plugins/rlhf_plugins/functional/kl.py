"""KL from the reference policy: three estimators, the KL-penalised reward, the adaptive coefficient.

Estimators: J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html, for
KL[policy, reference] with tokens sampled from the policy; d = logp - logp_ref is the blog's -log r. As *estimates*
k1 and k3 are unbiased and k2 is not. As *losses* differentiated through logp it is the other way round: the expected
gradient of k1 is zero and only k2's is the gradient of the KL. The penalised reward below differentiates none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import at_least_float32, check_ragged, check_same_length, last_index, own_tokens

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """d, per token: [N], [N] -> [N], nats. Unbiased, of either sign, high variance.

    Raises: ValueError if the two are not [N] alike.
    """
    check_same_length(logp=logp, logp_ref=logp_ref)
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """d^2 / 2, per token: [N], [N] -> [N], nats. Biased, never negative, low variance.

    Raises: ValueError if the two are not [N] alike.
    """
    return 0.5 * k1(logp, logp_ref).square()


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """e^{-d} - 1 + d, per token: [N], [N] -> [N], nats. Unbiased, never negative.

    In float32 it is infinite once -d passes 88.

    Raises: ValueError if the two are not [N] alike.
    """
    d = k1(logp, logp_ref)
    return torch.expm1(-d) + d  # expm1, for e^{-d} - 1 loses every digit where the policies nearly agree


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


@attrs.frozen(eq=False)
class PenalisedRewards:
    """What `penalised_rewards` returns."""

    rewards: Tensor  # [N], score units: -kl_coef * kl_per_token, plus the score at the last own token
    kl_per_token: Tensor  # [N], nats; 0 where masked. Its sum over a response is that response's KL.


def penalised_rewards(
    score: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor,
    lengths: Tensor,
    kl_coef: float,
    estimator: Estimator = k1,
    mask: Tensor | None = None,
) -> PenalisedRewards:
    """r_t = -kl_coef * kl_t + [t is the last own token] * score.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2; Stiennon et al. 2020 (arXiv:2009.01325), section 3.4.

    score: [B], score units, already shaped and clipped. logp_old: [N], nats, the policy that sampled. logp_ref: [N],
    nats. lengths: int64 [B]. kl_coef: score units a nat. mask: bool [N]; a token the policy did not choose pays no KL.
    With a mask the score stands on the last *own* token, the one `gae` reads, even where a tool's output ends the
    response. The result carries no gradient, for a reward is data, and is float32 for half-precision input.

    Raises: ValueError if a shape differs, kl_coef is negative or not finite, or a response has no own token to carry
    its score.
    """
    check_ragged(lengths, logp_old=logp_old, logp_ref=logp_ref)
    check_same_length(score=score, lengths=lengths)
    own = own_tokens(mask, logp_old)
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"expected a finite kl_coef >= 0, given {kl_coef}")
    with torch.no_grad():
        kl = torch.where(own, estimator(at_least_float32(logp_old), at_least_float32(logp_ref)), 0.0)  # [N]
        at_end = torch.zeros_like(kl).index_copy(0, last_index(lengths, mask), score.to(kl.dtype))  # [N]
        return PenalisedRewards(rewards=at_end - kl_coef * kl, kl_per_token=kl)


def adaptive_kl_coef(coef: float, kl: float, target: float, n: int, horizon: float) -> float:
    """The next KL coefficient: coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, with the step of their code, n / horizon, for K_beta.

    coef: score units a nat. kl: nats a response: *summed* over the response's tokens, then averaged over responses
    (every response weighs the same, however long). target: nats a response. n: responses since the last update.
    horizon: responses; the coefficient can change by a factor of about e^{0.2} over one horizon.

    Raises: ValueError if an argument is not finite or out of range (a NaN KL would pass silently as a clipped one), or
    if n > 5 horizons, where the coefficient could turn negative.
    """
    if not all(math.isfinite(x) for x in (coef, kl, target, horizon)):
        raise ValueError(f"expected finite numbers, given coef={coef}, kl={kl}, target={target}, horizon={horizon}")
    if coef < 0 or target <= 0 or horizon <= 0 or not 0 <= n <= 5 * horizon:
        raise ValueError(
            "expected coef >= 0, target > 0, horizon > 0 and 0 <= n <= 5 * horizon, "
            f"given coef={coef}, target={target}, horizon={horizon}, n={n}"
        )
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * n / horizon)
