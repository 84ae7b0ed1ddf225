"""Implicit language Q-learning: targets, expectile loss and weights by advantage, a token each.

Source: implicit Q-learning, Kostrikov et al. 2021 (arXiv:2110.06169); for language, Snell et al. 2022
(arXiv:2206.11871).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import after_tokens, check_same_length

WEIGHT_MAX = 100.0
"""Of an advantage's exponential, as implicit Q-learning's code caps it."""


def q_targets(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, mask: Tensor) -> Tensor:
    """r_t + gamma V(s_{t+1}), the value after a response's last token being 0: [N], without gradient. The next state is
    that before the policy's next own token; tokens that aren't its own have the target 0.

    rewards: [N], of each token. values: [N], of the state before each token. lengths: int64 [B]. mask: bool [N], own.
    Raises: ValueError if a shape differs.
    """
    check_same_length(rewards=rewards, values=values, mask=mask)
    of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # the response of each token
    own = torch.bincount(of[mask], minlength=len(lengths))
    end = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
    found = torch.zeros_like(rewards)
    found[mask] = (rewards[mask] + gamma * after_tokens(values[mask], end, own)).detach().to(found.dtype)
    return found


def expectile_loss(q: Tensor, values: Tensor, tau: float) -> Tensor:
    """|tau - [q < v]| (q - v)^2: [N]. With tau above 1/2 the value tends to what the better actions are worth.

    q: [N], without gradient. values: [N]. tau: between 0 and 1.
    Raises: ValueError if a shape differs or tau is out of range.
    """
    check_same_length(q=q, values=values)
    if not 0.0 < tau < 1.0:
        raise ValueError(f"expected tau between 0 and 1, given {tau}")
    ahead = q.detach() - values
    return (tau - (ahead < 0).to(ahead.dtype)).abs() * ahead.square()


def advantage_weights(q: Tensor, values: Tensor, beta: float) -> Tensor:
    """min(e^{beta (q - v)}, 100): [N], without gradient."""
    return torch.exp(beta * (q - values).detach()).clamp(max=WEIGHT_MAX)
