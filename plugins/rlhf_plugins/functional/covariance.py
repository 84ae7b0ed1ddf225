"""Tokens of high covariance between log-prob and advantage: what makes a policy narrow.

Source: Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models"
(arXiv:2505.22617): under a policy gradient the entropy falls by about the covariance of a token's log-prob and its
advantage, and few tokens have nearly all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import check_same_length, own_tokens


def token_covariance(
    logp: Tensor, advantages: Tensor, logp_mean: Tensor, advantage_mean: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(logp - its mean) (A - its mean), per token: [N] -> [N] float64, nats times advantage units; -inf where masked,
    so that it is never among the highest.

    logp: nats, advantages: both [N]. The means are [], over own tokens of the whole optimiser step, all ranks.
    Raises: ValueError if the shapes differ or the mask does not fit.
    """
    check_same_length(logp=logp, advantages=advantages)
    own = own_tokens(mask, logp)
    centred = (logp.detach().double() - logp_mean) * (advantages.detach().double() - advantage_mean)
    return torch.where(own, centred, -torch.inf)


def without_held(losses: Tensor, held: Tensor) -> Tensor:
    """Clip-Cov: losses [N] with exactly no gradient where `held`, bool [N]. They still count in a mean.

    Raises: ValueError if the shapes differ.
    """
    check_same_length(losses=losses, held=held)
    return torch.where(held, 0.0, losses)


def pulled_back(losses: Tensor, held: Tensor, logp: Tensor, logp_old: Tensor, coef: float) -> Tensor:
    """KL-Cov: losses [N] with coef |logp - logp_old| added where `held`, bool [N], as the authors' code has it.

    coef: advantage units a nat. Where the two are equal the slope is 0, so it holds a token from the second update on;
    equal is what differs by no more than a forward's rounding, or the slope there would be +-coef by chance.
    Raises: ValueError if the shapes differ or coef is negative.
    """
    check_same_length(losses=losses, held=held, logp=logp, logp_old=logp_old)
    if not coef >= 0.0:
        raise ValueError(f"expected coef >= 0, given {coef}")
    away = torch.where(held, logp - logp_old, 0.0).abs()
    return losses + coef * torch.where(away > _ROUNDING, away, 0.0)


_ROUNDING = 1e-5
"""Nats, of a float32 log-prob computed twice in batches of other shapes."""
