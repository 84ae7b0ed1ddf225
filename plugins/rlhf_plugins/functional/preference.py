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
    _refuse_empty("ipo", n_chosen, n_rejected)
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


def exo_pair(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 1e-3
) -> Tensor:
    """KL(q, p): q = (s(beta D), s(-beta D)), what the policy says of the pair, p = (1 - eps, eps), what the label says.

    Source: Ji et al. 2024 (arXiv:2402.00856), equation 16 with K = 2. The KL is the reverse of DPO's, so it is 0 where
    s(beta D) = 1 - eps, and eps must be above 0: [P], nats.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(f"exo_pair needs label_smoothing in (0, 0.5), given {label_smoothing}; usual is 0.001")
    log_q, log_q_other = F.logsigmoid(beta * (c - r)), F.logsigmoid(-beta * (c - r))
    log_p, log_p_other = math.log1p(-label_smoothing), math.log(label_smoothing)
    return log_q.exp() * (log_q - log_p) + log_q_other.exp() * (log_q_other - log_p_other)


def nca_pair(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta c) - 0.5 log s(-beta c) - 0.5 log s(-beta r): [P]. Each reward is held near 0, not their difference.

    Source: noise contrastive alignment, Chen et al. 2024 (arXiv:2402.05369), with K = 2.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("nca_pair", label_smoothing)
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)


def robust(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """[-(1 - eps) log s(beta D) + eps log s(-beta D)] / (1 - 2 eps): [P].

    Its mean over labels swapped with probability eps is DPO's loss on the right ones. May be negative.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    _check(c, r, beta, n_chosen, n_rejected)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5), given {label_smoothing}")
    logits = beta * (c - r)
    clean, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1.0 - label_smoothing) * clean - label_smoothing * swapped) / (1.0 - 2.0 * label_smoothing)


def bco_pair(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta c) - log s(-beta r): [P]. A classifier of good and bad.

    Source: binary classifier optimisation, Jung et al. 2024 (arXiv:2404.04656), without its reward shift.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("bco_pair", label_smoothing)
    return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)


def sppo_hard(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: [P], nats squared. Each log-ratio has a target of its own.

    Source: self-play preference optimisation, Wu et al. 2024 (arXiv:2405.00675), equation 4.7, with the chosen's
    probability of winning 1 and the rejected's 0; 1 / beta is their eta.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("sppo_hard", label_smoothing)
    return (c - 1.0 / (2.0 * beta)).square() + (r + 1.0 / (2.0 * beta)).square()


def apo_zero(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """1 - s(beta c) + s(beta r): [P]. The chosen up, the rejected down: for data better than the policy.

    Source: anchored preference optimisation, D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("apo_zero", label_smoothing)
    return 1.0 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)


def apo_down(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """s(beta c) + 1 - s(beta D): [P]. Both down, the rejected more: for data worse than the policy.

    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 8.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("apo_down", label_smoothing)
    return torch.sigmoid(beta * c) + 1.0 - torch.sigmoid(beta * (c - r))


def discopop(
    c: Tensor,
    r: Tensor,
    beta: float,
    n_chosen: Tensor,
    n_rejected: Tensor,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
) -> Tensor:
    """-log s(beta D) (1 - m) + e^{-beta D} m with m = s(beta D / tau), tau > 0: [P].

    Source: the log-ratio modulated loss, Lu et al. 2024 (arXiv:2406.08414), eq. 5; found by a search over programs.
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("discopop", label_smoothing)
    if not (math.isfinite(tau) and tau > 0.0):
        raise ValueError(f"expected a finite tau > 0, given {tau}")
    logits = beta * (c - r)
    log_m = F.logsigmoid(logits / tau)
    # e^{-x} m as one exponential: apart, infinity times 0 where the model is very wrong.
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / tau) + torch.exp(log_m - logits)


def sigmoid_norm(
    c: Tensor, r: Tensor, beta: float, n_chosen: Tensor, n_rejected: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """-log s(beta (c / n_chosen - r / n_rejected)): [P]. DPO with the log-ratios averaged over tokens; a larger beta.

    Source: Lambert et al. 2024 (Tulu 3, arXiv:2411.15124).
    """
    _check(c, r, beta, n_chosen, n_rejected)
    _refuse_smoothing("sigmoid_norm", label_smoothing)
    _refuse_empty("sigmoid_norm", n_chosen, n_rejected)
    return -F.logsigmoid(beta * (c / n_chosen - r / n_rejected))


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
}
"""Of pairs by themselves. What looks at the whole minibatch, or at likelihoods, is apart: `transport`, `likelihood`."""


def divergence_score(x: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(e^x), what takes the place of a log-ratio x where the policy is held to the reference by another divergence.

    reverse_kl: x. forward_kl: 1 - e^{-x}. js: log 2 + log s(x). alpha: (1 - e^{-alpha x}) / alpha, which is forward_kl
    at alpha 1 and tends to reverse_kl at 0. All are 0 with slope 1 at x = 0 but js, whose slope there is 1/2.

    x: any shape, nats. alpha: in (0, 1].
    Source: Wang et al. 2023 (arXiv:2309.16240), table 1.
    Raises: ValueError for another divergence, or an alpha out of range.
    """
    if divergence == "reverse_kl":
        return x
    if divergence == "js":
        return math.log(2.0) + F.logsigmoid(x)
    if divergence not in ("forward_kl", "alpha"):
        raise ValueError(f"expected reverse_kl, forward_kl, js or alpha, given {divergence}")
    power = 1.0 if divergence == "forward_kl" else alpha
    if not 0.0 < power <= 1.0:
        raise ValueError(f"expected alpha in (0, 1], given {alpha}")
    # e^36 is 4e15, whose square float32 holds with room for factors; a completion so unlikely has no gradient then.
    return -torch.expm1((-power * x).clamp(max=36.0)) / power


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


def _refuse_empty(name: str, n_chosen: Tensor, n_rejected: Tensor) -> None:
    if bool((n_chosen <= 0).any()) or bool((n_rejected <= 0).any()):
        raise ValueError(f"{name} divides by completion lengths and was given one of no tokens; drop such pairs")
