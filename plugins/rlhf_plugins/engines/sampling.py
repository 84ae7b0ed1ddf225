"""Drawing tokens: a pure function of logits and uniforms, so that a seed fixes a response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: Sequence[int], count: int) -> Tensor:
    """float64 [count] in [0, 1), fixed by the seed's numbers: what a response is drawn with, token by token."""
    return torch.from_numpy(np.random.default_rng(list(seed)).random(count))


def draw(
    logits: Tensor, uniform: Tensor, greedy: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row by inverting its distribution function.

    Args:
        logits: [n, V].
        uniform: float64 [n], in [0, 1).
        greedy: bool [n], rows that take the likeliest token instead.
        temperature: divides the logits; above 0.
        top_k, top_p: keep the likeliest tokens only; 0 and 1 keep all.

    Returns:
        (int64 [n] tokens, float32 [n] nats: their log-probs in the distribution that was sampled)
    """
    logits = logits.float() / temperature
    if top_k or top_p < 1.0:
        logits = _truncated(logits, top_k, top_p)
    logp = torch.log_softmax(logits, dim=-1)  # [n, V]
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    # the first token whose cumulative probability exceeds u; the total is 1 only to rounding
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    tokens = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1)


def _truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the kept tokens at -inf: the `top_k` likeliest, and of these the fewest that hold `top_p`."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of the likelier ones
    before[:, 0] = 0.0
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
