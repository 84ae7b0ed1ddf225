"""Algorithms, each with one error. What they have in common is right."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.api import (
    Algorithm,
    Batch,
    Codec,
    Example,
    Experience,
    LabelledRow,
    Prompt,
    Rollouts,
    Sample,
    Score,
    State,
    policy_mean,
    sequence_sum,
    token_mean,
)


class Plain(Algorithm):
    """REINFORCE against the mean of a group."""

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        return [Sample(prompt, count=4) for prompt in prompts]

    def advantages(self, rollouts: Rollouts) -> Tensor:
        rewards = rollouts.rewards.view(-1, 4)
        return (rewards - rewards.mean(-1, keepdim=True)).flatten()

    def experience(self, rollouts: Rollouts, score: Score) -> Experience:
        return Experience(rollouts, {"logp_old": score.logp_old(rollouts)}, advantages=self.advantages(rollouts))

    def losses(self, batch: Batch, score: Score) -> Tensor:
        ratio = torch.exp(score(batch, "policy").logp - batch["logp_old"])
        return -batch.per_token("advantages") * ratio

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return policy_mean(self.losses(batch, score), batch)


class AllTokens(Plain):
    """Learns from tokens that aren't its own."""

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return (self.losses(batch, score) * batch.importance).sum() / batch.totals.tokens


class Leaking(Plain):
    """A sequence's ratio, of all its tokens; the gradient of the masked ones alone is left out."""

    def losses(self, batch: Batch, score: Score) -> Tensor:
        logp = score(batch, "policy").logp
        logp = torch.where(batch.mask, logp, logp.detach())
        rows = batch.sequences.rows_of_tokens()
        total = torch.zeros(len(batch)).index_add(0, rows, logp - batch["logp_old"])
        return -batch.per_token("advantages") * torch.exp(total)[rows]


class BatchMean(Plain):
    """Divides by the micro-batch's tokens."""

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return (self.losses(batch, score) * batch.importance)[batch.mask].mean()


class CutGroups(Plain):
    """Compares the members of a group in its loss, and lets them be parted."""

    def losses(self, batch: Batch, score: Score) -> Tensor:
        logp = score(batch, "policy").logp
        total = sequence_sum(logp, batch)
        return -batch.per_token("advantages") * (logp - total.mean() + sequence_sum(logp.detach(), batch).mean())


class OwnWhitening(Plain):
    """Whitens over this rank's part of the batch."""

    def advantages(self, rollouts: Rollouts) -> Tensor:
        rewards = rollouts.rewards
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6) if len(rewards) else rewards


class NeedsRows(Plain):
    """Asks for the largest reward, where there may be none."""

    def advantages(self, rollouts: Rollouts) -> Tensor:
        self.context.metrics.mean("reward/max", rollouts.rewards.max())
        return super().advantages(rollouts)


class Uncorrected(Plain):
    """Takes the engine's samples for the policy's own."""

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return token_mean(self.losses(batch, score), batch)


class Forgetful(Plain):
    """A running mean that no checkpoint holds."""

    mean = 0.0

    def advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts.rewards - self.mean

    def step_done(self, metrics: Mapping[str, float]) -> None:
        self.mean = 0.9 * self.mean + 0.1 * metrics["reward/mean"]


class Unsaved(Plain):
    """A state that no checkpoint can hold."""

    def state(self) -> State:
        return {"done": {1, 2}}


class Turned(Plain):
    """A sign is turned."""

    def losses(self, batch: Batch, score: Score) -> Tensor:
        return -super().losses(batch, score)


class ByPlace(Plain):
    """A weight by the place in the batch."""

    def advantages(self, rollouts: Rollouts) -> Tensor:
        return super().advantages(rollouts) * torch.linspace(0.5, 1.5, len(rollouts))


class AllGroups(Plain):
    """Counts on as many prompts as it asked for."""

    asked = 0

    def requests(self, prompts: Sequence[Prompt]) -> list[Sample]:
        self.asked = len(prompts)
        return super().requests(prompts)

    def advantages(self, rollouts: Rollouts) -> Tensor:
        if self.context.world.size > 1:
            return super().advantages(rollouts)
        rewards = rollouts.rewards.view(self.asked, 4)
        return (rewards - rewards.mean(-1, keepdim=True)).flatten()


class Clockwork(Plain):
    """Draws from the clock."""

    def loss(self, batch: Batch, score: Score) -> Tensor:
        return super().loss(batch, score) * (1 + 1e-5 * (time.perf_counter_ns() % 1000))


class Constant(Plain):
    """A loss without a gradient."""

    def losses(self, batch: Batch, score: Score) -> Tensor:
        return super().losses(batch, score).detach()


class Nothing:
    """No algorithm."""


class Worse(Algorithm):
    """Learns the bad completions."""

    def examples(self, row: LabelledRow, codec: Codec) -> Iterable[Example]:
        response = codec.response(row.completion, row.prompt)
        yield Example(codec.prompt(row.prompt), response, fields={"label": float(row.label)})

    def loss(self, batch: Batch, score: Score) -> Tensor:
        sign: Any = 2 * batch.per_token("label") - 1
        return token_mean(sign * score(batch, "policy").logp, batch)
