"""What flows through a step: ragged sequences, rollouts, experience, batches, scores.

Ragged means flat: per-token tensors are `[N]`, one response after another, N the number of response tokens; nothing is
padded and no algorithm sees a mask of padding. B counts sequences, U unique prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]
Divergence = Literal["forward_kl", "reverse_kl", "js"]
"""Of a policy p from a teacher q at a token. forward_kl: KL(q || p). reverse_kl: KL(p || q). js, with m = beta q + (1 -
beta) p: beta KL(q || m) + (1 - beta) KL(p || m)."""


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
                raise ValueError(f"experience {name!r} is {tuple(value.shape)}, not one a response: ({b},)")

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
    """
    return torch.where(batch.mask, x, torch.zeros_like(x)).sum() / max(batch.totals.tokens, 1)


def policy_mean(x: Tensor, batch: Batch) -> Tensor:
    """`token_mean` of the policy's loss on tokens that it is taken to have sampled: each is multiplied by its
    `importance`, so that in expectation the gradient is that of the policy's own samples, whatever the engine sampled
    from. Not for a value model's loss. x: [N]."""
    return token_mean(x * batch.importance, batch)


def sequence_mean(x: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the mean over sequences. x: [B]. Divides by the step's global sequence count."""
    return x.sum() / max(batch.totals.sequences, 1)


def group_mean(x: Tensor, batch: Batch) -> Tensor:
    """This micro-batch's part of the mean over groups. x: one a group. Divides by the step's global group count."""
    return x.sum() / max(batch.totals.groups, 1)


def sequence_sum(x: Tensor, of: Experience | Rollouts) -> Tensor:
    """Sum over each response's own tokens. x: [N] -> [B]; differentiable."""
    masked = torch.where(of.sequences.mask.to(x.device), x, torch.zeros_like(x))
    total = torch.zeros(len(of), dtype=x.dtype, device=x.device)
    return total.index_add(0, of.sequences.rows_of_tokens().to(x.device), masked)


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
