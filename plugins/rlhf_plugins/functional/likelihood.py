"""Preference losses without a reference, one a pair, of the policy's own log-probs *summed* over a completion's tokens.

logp_chosen, logp_rejected: [P], nats, <= 0. n_chosen, n_rejected: [P], completion tokens, > 0. A mean over tokens is
taken pair by pair, so that a pair weighs the same however long.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_plugins.functional.ragged import check_same_length


def sft(logp_chosen: Tensor, n_chosen: Tensor) -> Tensor:
    """-logp_chosen / n_chosen: [P], nats a token. The negative log-likelihood of the chosen completion.

    Source: Pang et al. 2024 (arXiv:2404.19733), the term that it adds to DPO's.
    """
    _check(n_chosen, logp_chosen=logp_chosen, n_chosen=n_chosen)
    return -logp_chosen / n_chosen


def simpo(
    logp_chosen: Tensor, logp_rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor, beta: float, gamma: float
) -> Tensor:
    """-log s(beta (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma): [P].

    beta: > 0, reward a nat a token. gamma: >= 0, the reward by which the chosen should be ahead.
    Source: Meng et al. 2024 (arXiv:2405.14734), equation 6.
    """
    _check(torch.minimum(n_chosen, n_rejected), logp_chosen=logp_chosen, logp_rejected=logp_rejected,
           n_chosen=n_chosen, n_rejected=n_rejected)  # fmt: skip
    _check_scale("beta", beta)
    if not (math.isfinite(gamma) and gamma >= 0.0):
        raise ValueError(f"expected a finite gamma >= 0, given {gamma}")
    return -F.logsigmoid(beta * (logp_chosen / n_chosen - logp_rejected / n_rejected) - gamma)


def cpo(logp_chosen: Tensor, logp_rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log s(beta d) - eps log s(-beta d), d = logp_chosen - logp_rejected: [P]. DPO with a flat reference.

    Source: Xu et al. 2024 (arXiv:2401.08417); the paper adds `sft`. eps = label_smoothing in [0, 0.5).
    """
    check_same_length(logp_chosen=logp_chosen, logp_rejected=logp_rejected)
    _check_scale("beta", beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5), given {label_smoothing}")
    logits = beta * (logp_chosen - logp_rejected)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean_logp: any shape. mean_logp: nats a token, <= 0; at 0 the odds are unbounded, so it
    is kept 1e-6 below."""
    kept = mean_logp.clamp(max=-1e-6)
    return kept - torch.log(-torch.expm1(kept))


def orpo(logp_chosen: Tensor, logp_rejected: Tensor, n_chosen: Tensor, n_rejected: Tensor) -> Tensor:
    """-log s(log odds of the chosen - log odds of the rejected), of their mean log-probs a token: [P].

    Source: Hong et al. 2024 (arXiv:2403.07691), equation 7; the paper's loss is `sft` plus lambda times this.
    """
    _check(torch.minimum(n_chosen, n_rejected), logp_chosen=logp_chosen, logp_rejected=logp_rejected,
           n_chosen=n_chosen, n_rejected=n_rejected)  # fmt: skip
    return -F.logsigmoid(log_odds(logp_chosen / n_chosen) - log_odds(logp_rejected / n_rejected))


def _check(fewest: Tensor, **named: Tensor) -> None:
    check_same_length(**named)
    if bool((fewest <= 0).any()):
        raise ValueError("a mean over the tokens of a completion that has none; drop such pairs")


def _check_scale(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"expected a finite {name} > 0, given {value}")
