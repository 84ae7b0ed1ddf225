"""An algorithm by itself: made-up rollouts or rows in; experience, losses and gradients out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from rlhf.data import Refusals, Rows
from rlhf.errors import RowError
from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Algorithm
from rlhf.offline import OfflineData
from rlhf.rollouts import groups_of, seeded
from rlhf.rows import PromptRow
from rlhf.sequences import Example, FinishReason, Prompt, Rollouts, Sequences
from rlhf.testing.table import VOCABULARY, LetterCodec, Table
from rlhf.world import ALONE, World

PROMPTS = 4
TOLERANCE = 1e-4
"""Of sums of float32 in another order, relative to the largest of them; an error of principle is far larger."""


def online(algorithm: Algorithm, table: Table, prompts: int = PROMPTS) -> Rollouts:
    """Responses of 2 to 6 tokens to what the algorithm asks for, with rewards that differ within a group; of those with
    3 tokens and more, the second isn't the policy's own."""
    rng = random.Random(7)
    asked = [Prompt(_draw(rng, 3 + i), PromptRow(f"prompt {i}", {"answer": "a"}), i) for i in range(prompts)]
    requests = seeded(list(algorithm.requests(asked)), 0, "the kit")
    groups = groups_of(requests)
    of = [(request, group) for request, group in zip(requests, groups, strict=True) for _ in range(request.count)]
    responses = [_draw(rng, rng.randint(2, 6)) for _ in of]
    unique = {id(request.prompt): request.prompt for request in requests}
    place = {key: i for i, key in enumerate(unique)}
    sequences = Sequences.of(
        [prompt.tokens for prompt in unique.values()],
        responses,
        prompt_of=[place[id(request.prompt)] for request, _ in of],
        masks=[_mask(response) for response in responses],
        group=[group for _, group in of],
    )
    first, second = (torch.tensor([rng.random() for _ in of]) for _ in range(2))
    finish: list[FinishReason] = ["length" if i % 3 == 0 else "stop" for i in range(len(of))]
    codec = LetterCodec()
    made = Rollouts(
        sequences=sequences,
        logp=None,
        finish=tuple(finish),
        rows=tuple(request.prompt.row for request, _ in of),
        prompts=tuple(request.prompt.row.prompt for request, _ in of),
        texts=tuple(codec.decode(response) for response in responses),
        tags=tuple(request.tag for request, _ in of),
        rewards=first + 0.5 * second,
        reward_parts={"first": first, "second": second},
        reward_weights={"first": 1.0, "second": 0.5},
    )
    if "policy" not in table.roles:
        return attrs.evolve(made, logp=torch.zeros(len(sequences.tokens)))
    with torch.no_grad():  # the engine's are those of weights that have moved since
        logp = table(made, "policy").logp
    nudge = 0.1 * torch.cos(torch.arange(len(logp), dtype=torch.float32))
    return attrs.evolve(made, logp=logp + nudge)


def _draw(rng: random.Random, count: int) -> Tensor:
    return torch.tensor([rng.randrange(2, VOCABULARY) for _ in range(count)])


def _mask(response: Tensor) -> Tensor | None:
    own = torch.ones(len(response), dtype=torch.bool)
    if len(response) < 3:
        return None
    own[1] = False
    return own


class _Masked:
    """An offline algorithm whose examples have a token that isn't the policy's own."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm

    def __call__(self, row: Any, codec: LetterCodec) -> list[Example]:
        found = []
        for example in self._algorithm.examples(row, codec):
            before = torch.ones(len(example.response), dtype=torch.bool) if example.mask is None else example.mask
            mask = _mask(example.response)
            found.append(example if mask is None else attrs.evolve(example, mask=before & mask))
        return found


def offline(algorithm: Algorithm, row_type: Any, records: Iterable[Mapping[str, Any]]) -> OfflineData:
    """Rows, encoded.

    Raises:
        ValueError: none of the records fits; says why the first doesn't.
    """
    rows: list[tuple[str, list[Example]]] = []
    why = ""
    encode = _Masked(algorithm)
    for i, record in enumerate(records):
        try:
            several = getattr(row_type, "split", lambda record: None)(record)
            for one in [record] if several is None else several:
                rows.append((f"record {i}", encode(row_type.from_record(one), LetterCodec())))
        except RowError as error:
            why = why or str(error)
    if not rows:
        raise ValueError(why)
    return OfflineData(Rows(rows, Refusals(), ("the kit",)), algorithm)


@attrs.frozen
class Learnt:
    """What the losses of a minibatch came to."""

    loss: float
    of_scores: dict[str, Tensor]
    """"ROLE.FIELD" -> gradients, [N] or [B]."""
    of_roles: dict[str, Tensor]
    """Role -> gradients of its table."""
    logged: dict[str, float]
    corrected: bool
    """Every loss has taken account of `importance`."""


def learn(algorithm: Algorithm, table: Table, minibatch: Experience, pieces: Sequence[Sequence[int]]) -> Learnt:
    """Gradients of a minibatch, cut into micro-batches of these rows.

    Raises:
        TypeError: a loss isn't a scalar tensor.
    """
    return _learn(algorithm, table, minibatch, pieces, ALONE)


def _learn(
    algorithm: Algorithm, table: Table, minibatch: Experience, pieces: Sequence[Sequence[int]], world: World
) -> Learnt:
    own = minibatch.sequences
    counts = world.sum(torch.tensor([own.token_count, len(own), own.group_count])).tolist()
    totals = Totals(*(int(n) for n in counts))
    with torch.no_grad():
        prepared = algorithm.prepare(minibatch, table)
    of_scores: dict[str, Tensor] = {}
    logged: dict[str, float] = {}
    total, corrected = 0.0, True
    for parameter in table.parameters.values():
        parameter.grad = None
    for piece in pieces:
        rows = torch.tensor(list(piece), dtype=torch.long)
        batch = Batch(prepared.select(rows), totals)
        table.asked.clear()
        loss = algorithm.loss(batch, table)
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the loss must be a scalar tensor, not {shape}")
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        total += float(loss.detach())
        corrected = corrected and batch.corrected
        for name, part in batch.logged.items():
            logged[name] = logged.get(name, 0.0) + float(part)
        for asked in table.asked:
            for name, tensor in asked.fields.items():
                if asked.sequences is not batch.sequences or tensor.grad is None:
                    continue
                index = rows if name == "score" else own.token_index(rows)
                key = f"{asked.role}.{name}"
                whole = of_scores.setdefault(key, torch.zeros(len(own) if name == "score" else len(own.tokens)))
                whole[index] += tensor.grad.float()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in table.parameters.items()
        if parameter.requires_grad
    }
    return Learnt(total, of_scores, gradients, logged, corrected)


def rank_learns(algorithm: Algorithm, table: Table, minibatch: Experience, world: World) -> Learnt:
    """One rank's part of a minibatch, as one micro-batch; nothing of it where it has no rows."""
    pieces = [range(len(minibatch))] if len(minibatch) else []
    return _learn(algorithm, table, minibatch, cast("Sequence[Sequence[int]]", pieces), world)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of sums."""
    size = max(float(a.abs().max()) if a.numel() else 0.0, float(b.abs().max()) if b.numel() else 0.0)
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= TOLERANCE * size + 1e-7).all())
