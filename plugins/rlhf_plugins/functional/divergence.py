"""Divergences of a policy from a teacher over the whole vocabulary, and their slopes.

log_p, log_q: [n, V], nats: log-probs of the policy and of the teacher, each normalised. With z the policy's logits of
which log_p = log softmax(z):

    forward_kl   KL(q || p) = sum q (log q - log p)              d / dz = p - q
    reverse_kl   KL(p || q) = sum p (log p - log q)              d / dz = p (log p - log q - KL(p || q))
    js           beta KL(q || m) + (1 - beta) KL(p || m)         d / dz = (1 - beta) p (log p - log m - KL(p || m))
                 with m = beta q + (1 - beta) p

Divided by beta, js tends to forward_kl as beta goes to 0; divided by 1 - beta, to reverse_kl as beta goes to 1.
Source: generalised knowledge distillation, Agarwal et al. 2024 (arXiv:2306.13649), section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "js")


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(the divergence at each position, [n] nats; its slope in the policy's logits, [n, V]). No gradient runs through.

    kind: of `KINDS`. beta: of js, between 0 and 1, both left out.
    Raises: ValueError if the shapes differ, for another kind, or a beta out of range.
    """
    if log_p.shape != log_q.shape:
        raise ValueError(f"expected log-probs of one shape, given {tuple(log_p.shape)} and {tuple(log_q.shape)}")
    if kind == "forward_kl":
        p, q = log_p.exp(), log_q.exp()
        return (q * (log_q - log_p)).sum(-1), p - q
    if kind == "reverse_kl":
        ratio, p = log_p - log_q, log_p.exp()
        found = (p * ratio).sum(-1)
        return found, ratio.sub_(found[:, None]).mul_(p)
    if kind != "js":
        raise ValueError(f"expected {', '.join(KINDS)}, given {kind}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"expected beta between 0 and 1, given {beta}")
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    of_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    ratio, p = log_p - log_m, log_p.exp()
    of_p = (p * ratio).sum(-1)
    return beta * of_q + (1.0 - beta) * of_p, ratio.sub_(of_p[:, None]).mul_(p).mul_(1.0 - beta)
