"""See `rlhf.testing.parts`. Imported when a plan uses them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlhf.experience import Batch, Experience, policy_mean, token_mean
from rlhf.interfaces import Algorithm, Codec, Reward, Score
from rlhf.mixture import completion_example
from rlhf.rows import CompletionRow
from rlhf.sequences import Example, Rollouts
from rlhf.testing.parts import share


class Letters(Reward):
    """The share of good letters in a response."""

    def judge(self, rollouts: Rollouts, score: Score) -> list[float]:
        return share(rollouts.texts)


class Imitate(Algorithm):
    """Maximum likelihood."""

    def examples(self, row: CompletionRow, codec: Codec) -> Iterable[Example]:
        yield completion_example(row, codec)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return token_mean(-score(batch, "policy").logp, batch)


class Anchored(Imitate):
    """Maximum likelihood, with a penalty for what a frozen reference finds unlikely."""

    def experience(self, rollouts: Experience, score: Score) -> Experience:
        return Experience(rollouts, {"logp_ref": score(rollouts, "reference").logp})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        logp = score(batch, "policy").logp
        return token_mean(-logp + 0.05 * (logp - batch["logp_ref"]).square(), batch)


class Reinforce(Algorithm):
    """REINFORCE against a reward of a half."""

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        return Experience(rollouts, advantage=rollouts.rewards - 0.5)

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return policy_mean(-batch.per_token("advantage") * score(batch, "policy").logp, batch)
