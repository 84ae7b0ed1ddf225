"""What a model says of sequences, how it is asked, and how the scores of parts are joined.

B counts sequences, N their response tokens, V the vocabulary; `[N]` is flat, as in `rlhf.sequences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import attrs
import torch
from torch import Tensor

from rlhf.sequences import Sequences

Divergence = Literal["forward_kl", "reverse_kl", "js"]
"""Of a policy p from a teacher q at a token. forward_kl: KL(q || p). reverse_kl: KL(p || q). js, with m = beta q + (1 -
beta) p: beta KL(q || m) + (1 - beta) KL(p || m)."""


@attrs.frozen(eq=False)
class Scores:
    """What a role says of sequences. Of an `lm` head: `logp`, `entropy`, or `divergence`; of a `scalar` head: `values`,
    `score`; of a `tokens` head: `values`, `logp`."""

    role: str
    logp_: Tensor | None = None
    entropy_: Tensor | None = None
    values_: Tensor | None = None
    score_: Tensor | None = None
    divergence_: Tensor | None = None

    def _need(self, value: Tensor | None, what: str, hint: str) -> Tensor:
        if value is None:
            raise AttributeError(f"the scores of role {self.role!r} hold no {what}: {hint}")
        return value

    @property
    def logp(self) -> Tensor:
        """float32 [N], nats: log-prob of each response token, logits divided by the sampling temperature. Of a `tokens`
        head, whose numbers are taken for logits, at temperature 1."""
        return self._need(self.logp_, "logp", "its head is scalar")

    @property
    def entropy(self) -> Tensor:
        """float32 [N], nats: of the distribution that each response token was drawn from."""
        return self._need(self.entropy_, "entropy", "ask for it with score(..., entropy=True)")

    @property
    def values(self) -> Tensor:
        """float32 [N]: the value of the state before each response token; of a `tokens` head, the token's own."""
        return self._need(self.values_, "values", "its head is lm")

    @property
    def score(self) -> Tensor:
        """float32 [B]: the scalar read at each sequence's last token."""
        return self._need(self.score_, "score", "its head is lm")

    @property
    def divergence(self) -> Tensor:
        """float32 [N], nats: of the distribution before each response token from another role's."""
        return self._need(self.divergence_, "divergence", "ask for it with score.divergence(...)")


@attrs.frozen(eq=False)
class LogitSource:
    """What a model's logits before response tokens are made from, some at a time: `logits_of(states[i : j])`, [n, V].
    All of them are never held."""

    states: Tensor  # [N, D], before each response token, without gradient
    logits_of: Callable[[Tensor], Tensor]
    """Of some of the states. Without gradient, and as long as the micro-batch's backward lasts."""


@attrs.frozen(eq=False)
class Comparison:
    """Over the whole vocabulary, at each response token: how far a role's distribution is from another's."""

    other: LogitSource
    kind: Divergence
    beta: float = 0.5
    """Of `js`."""
    temperature: float = 1.0
    """Divides the logits of both."""


@attrs.frozen(eq=False)
class ScoreRequest:
    """One role's part of a forward."""

    role: str
    sequences: Sequences
    temperature: float = 1.0
    entropy: bool = False
    compare: Comparison | None = None
    """Divergences are asked for, and no log-probs."""


def join_scores(parts: Iterable[tuple[Tensor, Scores]], of: Sequences) -> Scores:
    """Put scores of selected rows back in the order of the whole. parts: (rows int64, their scores), without gradient.

    Every row must be in exactly one part.
    """
    items = list(parts)
    first = items[0][1]
    out: dict[str, Tensor | None] = {}
    for name in ("logp_", "entropy_", "values_", "divergence_"):
        if getattr(first, name) is None:
            continue
        whole = torch.zeros(len(of.tokens))
        for rows, scores in items:
            whole[of.token_index(rows)] = getattr(scores, name).detach().float().cpu()
        out[name] = whole
    if first.score_ is not None:
        whole = torch.zeros(len(of))
        for rows, scores in items:
            assert scores.score_ is not None
            whole[rows] = scores.score_.detach().float().cpu()
        out["score_"] = whole
    return Scores(first.role, **out)
