"""Shaping of the reward model's scores, one a response, before the KL penalty: each function takes [B], returns [B].

The order is the caller's; each step's argument is in the units its predecessor left (a limit given to `clip_scores`
after `normalise_scores` is in standard deviations).
"""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
from torch import Tensor

from rlhf_plugins.functional.ragged import check_ragged, check_same_length


def eos_penalty(scores: Tensor, ended: Tensor, mode: Literal["replace", "subtract", "none"], value: float) -> Tensor:
    """Penalise responses that were cut off before an EOS: [B] -> [B], score units.

    "replace": their score becomes `value` (-1, say): the reward model never saw a finished text, so what it says is not
    used; Ziegler et al. 2019 (arXiv:1909.08593) give a fixed score to samples that break a format rule.
    "subtract": `value` is taken off (1, say), as TRL's missing_eos_penalty does. "none": nothing.

    ended: bool [B], an EOS was sampled (known from the sampler, not from the pad id, which may be EOS too).
    Raises: ValueError if a shape or dtype differs, the mode is unknown, or mode is "subtract" and value is negative, a
    reward for never stopping.
    """
    check_same_length(scores=scores, ended=ended)
    if ended.dtype != torch.bool:
        raise ValueError(f"expected ended torch.bool, given {ended.dtype}")
    if mode == "replace":
        return torch.where(ended, scores, value)
    if mode == "subtract":
        if not value >= 0.0:
            raise ValueError(f"mode 'subtract' takes value >= 0 and subtracts it, given {value}; try {-value}")
        return torch.where(ended, scores, scores - value)
    if mode == "none":
        return scores
    raise ValueError(f"expected mode 'replace', 'subtract' or 'none', given {mode!r}")


def length_penalty(scores: Tensor, lengths: Tensor, threshold: int, per_token: float, cap: float = math.inf) -> Tensor:
    """score - min(per_token * max(0, length - threshold), cap): [B] -> [B], score units.

    Linear above the threshold and zero up to it. With threshold = max_length - buffer, per_token = 1 / buffer and
    cap = 1 it is the Soft Overlong Punishment of DAPO (Yu et al. 2025, arXiv:2503.14476).

    lengths, threshold: response tokens. per_token: score units a token. cap: score units.
    Raises: ValueError if the shapes differ, or threshold, per_token or cap is negative.
    """
    check_ragged(lengths)
    check_same_length(scores=scores, lengths=lengths)
    if not (threshold >= 0 and per_token >= 0.0 and cap >= 0.0):
        raise ValueError(
            f"expected threshold, per_token and cap >= 0, given {threshold}, {per_token} and {cap}; "
            "the penalty is subtracted, so a positive per_token lowers the score"
        )
    excess = (lengths - threshold).clamp(min=0).to(scores.dtype)  # [B], tokens
    return scores - (per_token * excess).clamp(max=cap)


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores within [-limit, limit]: [B] -> [B]; None leaves them.

    limit: units of the scores given. Raises: ValueError if scores is not [B] or limit is not positive.
    """
    check_same_length(scores=scores)
    if limit is None:
        return scores
    if not limit > 0.0:
        raise ValueError(f"expected limit > 0 or None for no clipping, given {limit}")
    return scores.clamp(-limit, limit)


@attrs.frozen
class ScoreStats:
    """Running mean and spread of scores: plain numbers, so `attrs.asdict` is its checkpoint. Fresh: no score yet."""

    count: int = 0  # scores seen
    mean: float = 0.0  # score units
    m2: float = 0.0  # score units squared: sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Score units. Divided by count, not count - 1, as in whitening: the spread of the scores seen. 0 if none."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0


def merge_stats(a: ScoreStats, b: ScoreStats) -> ScoreStats:
    """Statistics of both sets of scores together, as if seen at once; for ranks, or a run and its batch.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
    the merge of which Welford's update is the case of one new score. No cancellation, unlike sums of squares.
    """
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    mean = a.mean + delta * b.count / count
    return ScoreStats(count=count, mean=mean, m2=a.m2 + b.m2 + delta * delta * a.count * b.count / count)


def update_stats(stats: ScoreStats, scores: Tensor) -> ScoreStats:
    """Statistics with a batch of scores [B] added. From a fresh `ScoreStats()` they are the batch's own.

    Raises: ValueError if scores is not [B], or one is not finite: it would poison every later normalisation.
    """
    check_same_length(scores=scores)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"expected finite scores, given {scores.tolist()}")
    if scores.shape[0] == 0:
        return stats
    batch = scores.detach().double()
    mean = batch.mean()  # divided by B: every response weighs the same
    m2 = (batch - mean).square().sum()
    return merge_stats(stats, ScoreStats(count=scores.shape[0], mean=float(mean), m2=float(m2)))


def normalise_scores(scores: Tensor, stats: ScoreStats, shift_mean: bool = False, eps: float = 1e-6) -> Tensor:
    """scores / std, or (scores - mean) / std with `shift_mean`: [B], score units -> [B], standard deviations.

    The mean stays by default: with it goes the reward for ending sooner or later, which depends on the score's sign.
    Scores that never varied (std <= eps, score units) give no scale and are divided by 1.

    Raises: ValueError if scores is not [B].
    """
    check_same_length(scores=scores)
    shifted = scores - stats.mean if shift_mean else scores
    return shifted / (stats.std if stats.std > eps else 1.0)
