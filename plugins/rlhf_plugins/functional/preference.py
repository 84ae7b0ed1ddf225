"""Losses on preference pairs, one a pair. The caller averages over pairs: a pair weighs the same however long.

DPO family: c and r are log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, each *summed* over its
completion tokens, in nats; D = c - r. In DPO's terms beta * c and beta * r are the implicit rewards.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_plugins.functional.ragged import check_same_length


class PreferenceLoss(Protocol):
    """A member of the DPO family. All take the same arguments, read or not, so that one recipe can call any.

    c, r: [P], nats, summed log-ratios. beta: > 0, implicit reward a nat. n_chosen, n_rejected: [P], completion tokens.
    label_smoothing: probability that a label is wrong; a loss that has no use for it refuses any but 0.
    Returns losses [P]. Raises: ValueError if the shapes differ or a number is out of range.
    """

    def __call__(
        self, c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
    ) -> Tensor: ...


def sigmoid(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - eps) log s(beta D) - eps log s(-beta D), eps = label_smoothing in [0, 0.5]: [P].

    Source: DPO, Rafailov et al. 2023 (arXiv:2305.18290), equation 7, at eps = 0; cDPO, Mitchell 2023
    (https://ericmitchell.ai/cdpo.pdf), equation 3, above it. At c = r, the first step, it is log 2 at every eps.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5], given {label_smoothing}")
    logits = beta * (c - r)
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """(c / n_chosen - r / n_rejected - 1 / (2 beta))^2: [P], nats a token squared.

    Source: Azar et al. 2023 (arXiv:2310.12036), equation 17, where beta is tau, with the log-ratios averaged over the
    completion's tokens, as TRL does, so that the fixed target 1 / (2 beta) means the same at every length. Its beta is
    therefore not DPO's.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("ipo", label_smoothing)
    if bool((n_chosen <= 0).any()) or bool((n_rejected <= 0).any()):
        raise ValueError("ipo divides by completion lengths and was given one of no tokens; drop such pairs")
    return (c / n_chosen - r / n_rejected - 1.0 / (2.0 * beta)).square()


def hinge(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """max(0, 1 - beta D): [P]. No gradient once D passes 1 / beta.

    Source: SLiC's margin (Zhao et al. 2023, arXiv:2305.10425) on DPO's implicit rewards, as in RSO (Liu et al. 2023,
    arXiv:2309.06657).
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("hinge", label_smoothing)
    return torch.relu(1.0 - beta * (c - r))


LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


def bradley_terry(r_chosen: Tensor, r_rejected: Tensor, margin: Tensor | None, centre_coef: float) -> Tensor:
    """-log s(r_chosen - r_rejected - margin) + centre_coef (r_chosen + r_rejected)^2: [P].

    Source: Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the margin is Llama 2's (Touvron et al. 2023,
    arXiv:2307.09288, equation 2); the centring term is Eisenstein et al. 2023 (arXiv:2312.09244), for a difference
    fixes rewards only up to a constant.

    r_chosen, r_rejected: [P], score units (the reward model's outputs, not log-ratios). margin: [P], score units, or
    None for 0. centre_coef: >= 0, a score unit squared.
    Raises: ValueError if the shapes differ or centre_coef is negative or not finite.
    """
    check_same_length(r_chosen=r_chosen, r_rejected=r_rejected)
    if not (math.isfinite(centre_coef) and centre_coef >= 0.0):
        raise ValueError(f"expected a finite centre_coef >= 0, given {centre_coef}")
    difference = r_chosen - r_rejected
    if margin is not None:
        check_same_length(r_chosen=r_chosen, margin=margin)
        difference = difference - margin
    return -F.logsigmoid(difference) + centre_coef * (r_chosen + r_rejected).square()


def _check(c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor) -> None:
    check_same_length(c=c, r=r, n_chosen=n_chosen, n_rejected=n_rejected)
    if not (math.isfinite(beta) and beta > 0.0):
        raise ValueError(f"expected a finite beta > 0, given {beta}")


def _refuse_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing != 0.0:
        raise ValueError(f"{name} has no label smoothing, given {label_smoothing}; use sigmoid, or set it to 0")
