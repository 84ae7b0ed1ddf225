"""How far what the engine samples is from what the trainer computes, and the weights that make up for it.

    d = log pi_old(y_t) - log pi_engine(y_t)      both under the weights that sampled, after temperature
    w = exp(d) of a token, or exp(sum of d over a response's own tokens) of each of its tokens
    clip: min(w, cap)       mask: w up to the cap, 0 beyond it

An engine in another precision, or with other kernels, samples from another distribution than the one whose gradient is
taken: for any f, E_engine[w f] = E_trainer[f]. The cap bounds the variance, at the price of a bias. A mean over tokens
still divides by all of them: what is masked is given to no other token.

Sources: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (truncated importance
sampling: clipped, a token at a time). Masking beyond the cap is IcePop's (Ling Team 2025) upper bound; its lower one is
left out, as a small weight is harmless. At sequence level a weight is a response's whole ratio, unbiased below the cap
where a token's leaves out what came before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.experience import Experience
from rlhf.sequences import Rollouts, Sequences
from rlhf.world import World


@attrs.frozen(eq=False)
class Weights:
    """What `importance_weights` returns, per token."""

    weights: Tensor  # float32 [N]; 1 on tokens that aren't the policy's own
    beyond: Tensor  # bool [N]: above the cap, so clipped or masked; False on tokens that aren't the policy's own


def importance_weights(difference: Tensor, sequences: Sequences, level: str, cap: float, beyond: str) -> Weights:
    """The weights of samples that another distribution drew.

    Args:
        difference: [N], nats: log-probs under the distribution that is meant, less those under the one that drew. What
            stands on tokens that aren't the policy's own is ignored.
        level: "token", or "sequence": a response's tokens share the product of theirs.
        cap: weights above it are clipped to it or, `beyond` "mask", 0.
    """
    own = sequences.mask
    log_ratio = torch.where(own, difference.double(), 0.0)
    if level == "sequence":
        rows = sequences.rows_of_tokens()
        log_ratio = torch.zeros(len(sequences), dtype=torch.float64).index_add(0, rows, log_ratio)[rows]
    ratio = log_ratio.exp()
    over = own & (ratio > cap)
    weights = torch.where(over, cap if beyond == "clip" else 0.0, ratio)
    return Weights(torch.where(own, weights, 1.0).float(), over)


@attrs.frozen(eq=False)
class _Row:
    """One rollout of the step."""

    difference: Tensor  # float64 [own tokens]
    weights: Tensor | None  # float32 [tokens]; None where none were asked for
    own: Tensor  # bool [tokens]
    beyond: Tensor  # bool [tokens]


class OffPolicy:
    """What a step has learnt of the engine's log-probs, rollout by rollout."""

    def __init__(self, level: str = "token", cap: float = 2.0, beyond: str = "clip") -> None:
        """
        Args:
            level: "token", "sequence", or "off": compared, not corrected.
        """
        self._level, self._cap, self._beyond = level, cap, beyond
        self.start()

    def start(self) -> None:
        """A step begins: its rollouts are others."""
        self._rows: dict[int, _Row] = {}  # by place among the step's rollouts
        self._known: list[tuple[Sequences, Tensor]] = []
        self._weighed = False

    def known(self, rollouts: Rollouts) -> Tensor | None:
        """The old log-probs of these very rollouts, where they were asked for before."""
        return next((logp for sequences, logp in self._known if sequences is rollouts.sequences), None)

    def compare(self, rollouts: Rollouts, logp: Tensor) -> None:
        """Note how far the engine's log-probs are from the trainer's.

        Args:
            logp: [N], nats, of the trainer, under the weights that sampled.

        Raises:
            RunError: the engine's isn't a finite number.
        """
        self._note(rollouts, logp, None)

    def weigh(self, rollouts: Rollouts, logp: Tensor) -> None:
        """The same, and the experience made of these rollouts is to have weights."""
        self._known.append((rollouts.sequences, logp))
        found: Weights | None = None
        if self._level != "off":
            assert rollouts.logp is not None
            difference, sequences = logp.double() - rollouts.logp.double(), rollouts.sequences
            found = importance_weights(difference, sequences, self._level, self._cap, self._beyond)
            self._weighed = True
        self._note(rollouts, logp, found)

    def _note(self, rollouts: Rollouts, logp: Tensor, found: Weights | None) -> None:
        assert rollouts.logp is not None
        own, lengths = rollouts.sequences.mask, rollouts.lengths.tolist()
        wrong = rollouts.logp[own & ~rollouts.logp.isfinite()]
        if len(wrong):
            raise RunError(
                f"the engine gave {float(wrong[0])} as log-prob of a token that it sampled ({len(wrong)} such)"
            )
        difference = logp.double() - rollouts.logp.double()
        beyond = torch.zeros_like(own) if found is None else found.beyond
        weights = [None] * len(lengths) if found is None else found.weights.split(lengths)
        parts = zip(difference.split(lengths), own.split(lengths), weights, beyond.split(lengths), strict=True)
        for place, (d, mask, weight, over) in zip(rollouts.places.tolist(), parts, strict=True):
            if weight is not None or place not in self._rows:  # what was only compared takes no weights away
                self._rows[place] = _Row(d[mask], weight, mask, over)

    def attach(self, experience: Experience) -> None:
        """Give an experience its field `importance`, [N], unless no weights were asked for in the step, or the
        algorithm gave it one of its own."""
        if not self._weighed or experience.places is None or "importance" in experience:
            return
        parts = [torch.zeros(0)]
        for place, length in zip(experience.places.tolist(), experience.lengths.tolist(), strict=True):
            row = self._rows.get(place)
            parts.append(torch.ones(length) if row is None or row.weights is None else row.weights)
        experience.of_tokens["importance"] = torch.cat(parts)

    def metrics(self, world: World) -> dict[str, float]:
        """The step's, over all ranks, a mean a token; nothing where nothing was compared. Every rank calls it."""
        rows = list(self._rows.values())
        d = _joined([row.difference for row in rows])
        weights = _joined([row.weights[row.own] for row in rows if row.weights is not None])
        over = sum(int(row.beyond.sum()) for row in rows)
        own = [
            len(d), float(d.abs().sum()), float((d.expm1() - d).sum()), float(d.abs().max()) if len(d) else 0.0,
            len(weights), float(weights.sum()), float(weights.square().sum()), over,
        ]  # fmt: skip
        everybody = world.gather([value if math.isfinite(value) else repr(value) for value in own])
        tokens, distance, kl, furthest, weighed, total, squares, beyond = (
            [float(value) for value in values] for values in zip(*everybody, strict=True)
        )
        found: dict[str, float] = {}
        if n := sum(tokens):
            found["engine/logp_difference"] = sum(distance) / n
            found["engine/logp_difference_max"] = max(furthest)
            found["engine/kl"] = sum(kl) / n
        if n := sum(weighed):
            found["importance/mean"] = sum(total) / n
            found["importance/clipped" if self._beyond == "clip" else "importance/masked"] = sum(beyond) / n
            # Kish's: n equal weights count as n samples, a single one as 1; here by n
            found["importance/ess"] = sum(total) ** 2 / (n * sum(squares)) if sum(squares) else 0.0
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """float64 [sum of lengths]."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.double() for part in parts)])
