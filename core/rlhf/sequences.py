"""Ragged sequences, and what sampling makes of them: prompts, requests, generations, rollouts; of data, examples.

Ragged means flat: per-token tensors are `[N]`, one response after another, N the number of response tokens; nothing is
padded and no algorithm sees a mask of padding. B counts sequences, U unique prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@attrs.frozen(eq=False)
class Sequences:
    """B sequences, each a prompt and a response; a prompt shared by several is held once."""

    prompts: tuple[Tensor, ...]  # U x int64 [P_u], token ids
    prompt_of: Tensor  # int64 [B], index into prompts
    tokens: Tensor  # int64 [N], response token ids, flat
    lengths: Tensor  # int64 [B], tokens a response
    mask: Tensor  # bool [N], False where the token isn't the policy's own (tool output, a user's turn)
    group: Tensor  # int64 [B], sequences of one group (a prompt's completions, a pair) share a number

    @classmethod
    def of(
        cls,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        *,
        prompt_of: Sequence[int] | None = None,
        masks: Sequence[Tensor | None] | None = None,
        group: Sequence[int] | None = None,
    ) -> Sequences:
        """Make sequences of lists.

        Args:
            prompts: U (or B, when `prompt_of` is left out) int64 tensors.
            responses: B int64 tensors.
            prompt_of: for each response its prompt; left out, the i-th.
            masks: for each response a bool tensor of its length, or None for all True.
            group: for each response its group; left out, its prompt.
        """
        index = list(range(len(responses))) if prompt_of is None else list(prompt_of)
        for name, given in (("prompt_of", index), ("masks", masks), ("group", group)):
            if given is not None and len(given) != len(responses):
                raise ValueError(f"{name} has {len(given)} items for {len(responses)} responses")
        lengths = torch.tensor([len(response) for response in responses], dtype=torch.long)
        tokens = torch.cat(list(responses)).long() if responses else torch.zeros(0, dtype=torch.long)
        mask = torch.ones(len(tokens), dtype=torch.bool)
        for start, length, own in zip(_starts(lengths), lengths.tolist(), masks or [None] * len(lengths), strict=True):
            if own is not None:
                mask[start : start + length] = own
        return cls(
            tuple(prompts),
            torch.tensor(index, dtype=torch.long),
            tokens,
            lengths,
            mask,
            torch.tensor(index if group is None else list(group), dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def token_count(self) -> int:
        """Response tokens that are the policy's own."""
        return int(self.mask.sum())

    @property
    def group_count(self) -> int:
        return len(torch.unique(self.group))

    def prompt(self, i: int) -> Tensor:
        """Token ids of the i-th sequence's prompt, int64 [P]."""
        return self.prompts[int(self.prompt_of[i])]

    def responses(self) -> tuple[Tensor, ...]:
        """B int64 tensors, views of `tokens`."""
        return torch.split(self.tokens, self.lengths.tolist())

    def total_lengths(self) -> list[int]:
        """Prompt and response tokens of each sequence."""
        return [len(self.prompt(i)) + n for i, n in enumerate(self.lengths.tolist())]

    def token_index(self, rows: Tensor) -> Tensor:
        """Where the tokens of these rows lie in a flat `[N]` tensor, in the order of `rows`. int64 [sum of lengths]."""
        starts = torch.tensor(_starts(self.lengths), dtype=torch.long)
        pieces = [torch.arange(int(starts[i]), int(starts[i] + self.lengths[i])) for i in rows.tolist()]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)

    def select(self, rows: Tensor) -> Sequences:
        """These rows (int64), in this order; prompts that none of them uses are dropped."""
        index = self.token_index(rows)
        used = self.prompt_of[rows]
        kept, new_of = torch.unique(used, return_inverse=True)
        return Sequences(
            tuple(self.prompts[i] for i in kept.tolist()),
            new_of,
            self.tokens[index],
            self.lengths[rows],
            self.mask[index],
            self.group[rows],
        )

    def rows_of_tokens(self) -> Tensor:
        """For each flat token the row it belongs to. int64 [N]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)


def _starts(lengths: Tensor) -> list[int]:
    total, starts = 0, []
    for n in lengths.tolist():
        starts.append(total)
        total += n
    return starts


@attrs.frozen(eq=False)
class Example:
    """One sequence of an offline algorithm: what `Algorithm.examples` yields."""

    prompt: Tensor  # int64 [P], P >= 1: the first response token needs something before it
    response: Tensor  # int64 [R], R >= 1
    mask: Tensor | None = None  # bool [R]; None is all True
    fields: Mapping[str, float] = attrs.Factory(dict)
    """Numbers of the row that the loss needs, such as a margin; `[B]` tensors in the batch."""
    token_fields: Mapping[str, Tensor] = attrs.Factory(dict)
    """float [R] each: numbers a token, such as a step's label; `[N]` tensors in the batch."""


@attrs.frozen(eq=False)
class Prompt:
    """A prompt to sample from."""

    tokens: Tensor  # int64 [P]
    row: Any
    """The row of data it came from; its `extra` columns are what rewards see."""
    index: int
    """Position in the step's global batch, the same on any number of ranks."""


@attrs.frozen(eq=False)
class Sample:
    """A sampling request: so many responses to a prompt, all in one group."""

    prompt: Prompt
    count: int = 1
    greedy: bool = False
    """The most likely token at each position, whatever the engine's temperature."""
    seed: int | None = None
    """Set by the loop: the response depends on it and the weights, not on what else is in the batch."""
    tag: str = ""
    """The algorithm's own mark (such as "baseline"), given back in `Rollouts.tags`."""


@attrs.frozen(eq=False)
class Generation:
    """What an engine returns for the requests, in their order: sequences and what it knows of them."""

    sequences: Sequences
    logp: Tensor | None  # float32 [N], nats, of the sampled tokens; None where the engine can't tell
    finish: tuple[FinishReason, ...]  # B
    version: int = 0
    """Of the weights that sampled."""
    failed: Mapping[int, str] = attrs.Factory(dict)
    """Responses that could not be had, by their place -> why. They have no tokens; their groups are left out and they
    are counted, never judged: they are no bad responses."""


@attrs.frozen(eq=False)
class Rollouts:
    """Responses with their rewards."""

    sequences: Sequences
    logp: Tensor | None  # float32 [N], the engine's log-probs
    finish: tuple[FinishReason, ...]  # B
    rows: tuple[Any, ...]  # B rows of data
    prompts: tuple[str, ...]  # B texts
    texts: tuple[str, ...]  # B responses, without special tokens
    tags: tuple[str, ...]  # B
    rewards: Tensor  # float32 [B], the weighted sum; zeros before they are judged
    reward_parts: Mapping[str, Tensor] = attrs.Factory(dict)  # source -> float32 [B], unweighted
    temperature: float = 1.0
    """That sampled them; every log-prob of them divides the logits by it."""
    version: int = 0
    places: Tensor = attrs.field(  # int64 [B], of each among the step's rollouts of this rank
        default=attrs.Factory(lambda self: torch.arange(len(self.sequences)), takes_self=True)
    )
    failed: Mapping[int, str] = attrs.Factory(dict)
    """Those that could not be had, by their place -> why; none once they are judged."""
    reward_weights: Mapping[str, float] = attrs.Factory(dict)  # source -> its weight in the sum

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> Tensor:
        return self.sequences.lengths

    @property
    def ended(self) -> Tensor:
        """bool [B]: the response ended by itself, not at the length limit."""
        return torch.tensor([reason == "stop" for reason in self.finish], dtype=torch.bool)

    def select(self, rows: Tensor) -> Rollouts:
        """These rows (int64), in this order."""
        index, picked = self.sequences.token_index(rows), rows.tolist()
        return attrs.evolve(
            self,
            sequences=self.sequences.select(rows),
            logp=None if self.logp is None else self.logp[index],
            finish=tuple(self.finish[i] for i in picked),
            rows=tuple(self.rows[i] for i in picked),
            prompts=tuple(self.prompts[i] for i in picked),
            texts=tuple(self.texts[i] for i in picked),
            tags=tuple(self.tags[i] for i in picked),
            rewards=self.rewards[rows],
            reward_parts={name: part[rows] for name, part in self.reward_parts.items()},
            places=self.places[rows],
            failed={place: self.failed[i] for place, i in enumerate(picked) if i in self.failed},
        )
