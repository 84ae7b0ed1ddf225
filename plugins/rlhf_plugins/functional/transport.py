"""Preference losses that compare distributions, not pairs: AOT, by one-dimensional optimal transport, which is sorting.

    aot           x = log pi(chosen) - log pi(rejected) of each pair, y the same under the reference
    aot_unpaired  x = c of each chosen, y = r of each rejected: log-ratios of policy to reference
    L = mean_i f(x_(i) - y_(i)), f(d) = -(1 - eps) log s(beta d) - eps log s(-beta d), x_(i) the i-th smallest

Source: Melnyk et al. 2024 (arXiv:2406.05882). The sorting is over the whole minibatch; once it is
known which y each x meets (`counterparts`), the loss is a sum of terms of one pair each and can be cut anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_plugins.functional.preference import sigmoid
from rlhf_plugins.functional.ragged import check_same_length


def counterparts(x: Tensor, y: Tensor) -> Tensor:
    """For each x the y of the same rank: [P]. x, y: [P]; among equals, the earlier is the smaller.

    Raises: ValueError if the shapes differ.
    """
    check_same_length(x=x, y=y)
    order = torch.argsort(x, stable=True)
    found = torch.empty_like(y)
    found[order] = torch.sort(y, stable=True).values
    return found


def aot(x: Tensor, met: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """f(x - met): [P]. x: [P], the policy's differences, nats. met: [P], `counterparts` of them, without gradient."""
    return sigmoid(x, met.detach(), beta, torch.ones_like(x), torch.ones_like(x), label_smoothing)


def aot_unpaired(
    c: Tensor, r: Tensor, met_by_c: Tensor, met_by_r: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """One a pair, [P]; their mean over the minibatch is that of f(c_(i) - r_(i)), value and gradient.

    c, r: [P], log-ratios, nats. met_by_c: [P], for each c the r that it meets; met_by_r: for each r the c; both without
    gradient, of the weights as they are. The value is that of the c's terms; the r's give their gradient alone, since
    each term has been counted with its c.
    """
    of_c = aot(c, met_by_c, beta, label_smoothing)
    of_r = sigmoid(met_by_r.detach(), r, beta, torch.ones_like(r), torch.ones_like(r), label_smoothing)
    return of_c + (of_r - of_r.detach())
