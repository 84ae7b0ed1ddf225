"""What is learnt from: sequences with what the loss needs of them, the batches they are cut into, and the means and
sums over a batch.

B counts sequences, N their response tokens; `[N]` is flat, as in `rlhf.sequences`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from rlhf.sequences import Rollouts, Sequences


class Experience:
    """Sequences with what the loss needs of them: `[B]` numbers a response, flat `[N]` numbers a token."""

    def __init__(
        self,
        of: Rollouts | Sequences | Experience,
        tokens: Mapping[str, Tensor] | None = None,
        **per_response: Tensor,
    ) -> None:
        """The sequences of something, with fields.

        Args:
            of: the rollouts or sequences; their order is kept.
            tokens: name -> float `[N]`, one number a response token.
            per_response: name -> float `[B]`, one number a response.

        Raises:
            ValueError: a tensor of another length.
        """
        self.sequences: Sequences = of if isinstance(of, Sequences) else of.sequences
        self.temperature: float = 1.0 if isinstance(of, Sequences) else of.temperature
        self.places: Tensor | None = None if isinstance(of, Sequences) else of.places  # int64 [B]
        before = of if isinstance(of, Experience) else None
        self.of_tokens: dict[str, Tensor] = {**(before.of_tokens if before else {}), **(tokens or {})}
        self.of_responses: dict[str, Tensor] = {**(before.of_responses if before else {}), **per_response}
        n, b = len(self.sequences.tokens), len(self.sequences)
        for name, value in self.of_tokens.items():
            if value.shape != (n,):
                raise ValueError(f"experience {name!r} is {tuple(value.shape)}, not one a response token: ({n},)")
        for name, value in self.of_responses.items():
            if value.shape != (b,):
                told = "; numbers a token are given as tokens={...}" if value.shape == (n,) else ""
                raise ValueError(f"experience {name!r} is {tuple(value.shape)}, not one a response: ({b},){told}")

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, name: str) -> bool:
        return name in self.of_tokens or name in self.of_responses

    def __getitem__(self, name: str) -> Tensor:
        """A field as it was given: `[N]` or `[B]`."""
        if name in self.of_tokens:
            return self.of_tokens[name]
        if name in self.of_responses:
            return self.of_responses[name]
        known = ", ".join([*self.of_tokens, *self.of_responses]) or "none"
        raise KeyError(f"the experience has no {name!r}; it has {known}")

    def per_token(self, name: str) -> Tensor:
        """A field as `[N]`: one number a response is repeated over its tokens."""
        value = self[name]
        return value if name in self.of_tokens else torch.repeat_interleave(value, self.lengths.to(value.device))

    @property
    def lengths(self) -> Tensor:
        """int64 [B]"""
        return self.sequences.lengths

    @property
    def mask(self) -> Tensor:
        """bool [N], the policy's own tokens."""
        return self.sequences.mask

    @property
    def importance(self) -> Tensor:
        """float32 [N]: what a token's part of a policy's loss is multiplied by, since the engine sampled from another
        distribution than the policy's; 1 where it is exact, and on data. `policy_mean` does it."""
        if "importance" in self.of_tokens:
            return self.of_tokens["importance"]
        return torch.ones(len(self.sequences.tokens))

    def select(self, rows: Tensor) -> Experience:
        """These rows (int64), in this order."""
        index = self.sequences.token_index(rows)
        part = Experience(
            self.sequences.select(rows),
            {name: value[index] for name, value in self.of_tokens.items()},
            **{name: value[rows] for name, value in self.of_responses.items()},
        )
        part.temperature = self.temperature
        part.places = None if self.places is None else self.places[rows]
        return part

    def to_state(self) -> dict[str, Any]:
        """As nested dicts and lists of numbers and tensors, to be sent to another rank."""
        s = self.sequences
        return {
            "prompts": list(s.prompts),
            "sequences": [s.prompt_of, s.tokens, s.lengths, s.mask, s.group],
            "temperature": self.temperature,
            "tokens": self.of_tokens,
            "responses": self.of_responses,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Experience:
        """The inverse of `to_state`."""
        sequences = Sequences(tuple(state["prompts"]), *state["sequences"])
        found = Experience(sequences, state["tokens"], **state["responses"])
        found.temperature = state["temperature"]
        return found


@attrs.frozen
class Totals:
    """Counts over the whole optimiser step: all micro-batches, all ranks. What every mean of a loss divides by."""

    tokens: int
    """The policy's own response tokens."""
    sequences: int
    groups: int


class Batch(Experience):
    """A micro-batch: the part of an optimiser step that one forward takes."""

    def __init__(self, of: Experience, totals: Totals, device: str = "cpu") -> None:
        """`device`: where the fields go, so that they meet the scores there; the sequences stay on the CPU."""
        super().__init__(of)
        self.of_tokens = {name: value.to(device) for name, value in self.of_tokens.items()}
        self.of_responses = {name: value.to(device) for name, value in self.of_responses.items()}
        self.totals = totals
        self.device = device
        self.logged: dict[str, Tensor] = {}
        self.corrected = "importance" not in self.of_tokens
        """Whether the loss has taken account of `importance`, where there is any."""

    @property
    def mask(self) -> Tensor:
        """bool [N] on the batch's device, the policy's own tokens."""
        return self.sequences.mask.to(self.device)

    @property
    def importance(self) -> Tensor:
        """float32 [N] on the batch's device; see `Experience`."""
        self.corrected = True
        return super().importance.to(self.device)

    def log(self, name: str, part: Tensor) -> None:
        """Report this micro-batch's part of a mean (made by `token_mean` and the like); the parts are added up."""
        self.logged[name] = self.logged.get(name, torch.zeros(())) + part.detach().float().cpu()


def token_mean(x: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the mean over the policy's own tokens. x: [N].

    Divides by the optimiser step's global token count, so that the parts of all micro-batches and ranks add up to the
    mean however the batch was cut; each token weighs the same, however long its response.

    Raises:
        ValueError: x is of another length.
    """
    _check_length(x, len(batch.sequences.tokens), "a response token")
    return torch.where(batch.mask, x, torch.zeros_like(x)).sum() / max(batch.totals.tokens, 1)


def policy_mean(x: Tensor, batch: Batch) -> Tensor:
    """`token_mean` of the policy's loss on tokens that it is taken to have sampled: each is multiplied by its
    `importance`, so that in expectation the gradient is that of the policy's own samples, whatever the engine sampled
    from. Not for a value model's loss. x: [N]."""
    return token_mean(x * batch.importance, batch)


def sequence_mean(x: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the mean over sequences. x: [B]. Divides by the step's global sequence count.

    Raises:
        ValueError: x is of another length.
    """
    _check_length(x, len(batch), "a sequence")
    return x.sum() / max(batch.totals.sequences, 1)


def group_mean(x: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the mean over groups. x: one a group. Divides by the step's global group count.

    Raises:
        ValueError: x is of another length.
    """
    _check_length(x, batch.sequences.group_count, "a group")
    return x.sum() / max(batch.totals.groups, 1)


def _check_length(x: Tensor, count: int, of: str) -> None:
    if x.shape != (count,):
        raise ValueError(f"a mean of {tuple(x.shape)}, not of one number {of}: ({count},)")


def sequence_sum(x: Tensor, of: Experience | Rollouts) -> Tensor:
    """Sum over each response's own tokens. x: [N] -> [B]; differentiable."""
    masked = torch.where(of.sequences.mask.to(x.device), x, torch.zeros_like(x))
    total = torch.zeros(len(of), dtype=x.dtype, device=x.device)
    return total.index_add(0, of.sequences.rows_of_tokens().to(x.device), masked)
