"""How ragged sequences become rectangles for a trunk's forward, and where in them each response token lies.

Where attention can be told where sequences lie (`ragged`), there is one row and nothing in it is padding:

    flat           prompt response response prompt response prompt response response response

Else there are two layouts, mixed freely in a forward, with the same results:

    plain row      prompt response                      causal, so what pads its end changes nothing
    shared row     prompt response response response    a prompt once; each response sees the prompt and itself

A shared row saves a prompt for each further response and pays with attention over the whole row, which grows with the
square of its length; so the responses of a prompt are dealt over as many rows as cost least. Rows alike in length are
put in one rectangle.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlhf.api import Sequences
from rlhf_plugins.policies import ragged


@attrs.frozen
class Costs:
    """What a forward costs, in units of a token's matrix products."""

    pair: float
    """A pair of tokens in attention."""
    call: float
    """A forward, however small."""

    def row(self, tokens: float, shared: bool) -> float:
        """A causal kernel skips some of the pairs (half at best, a quarter measured); one with a mask skips none."""
        return tokens + self.pair * tokens * tokens * (1.0 if shared else 0.75)


@attrs.frozen
class Row:
    """Prompts, each with some of its responses; but for a flat row, one prompt."""

    texts: tuple[tuple[int, tuple[int, ...]], ...]  # (prompt, its sequences)
    tokens: int


@attrs.frozen(eq=False)
class Grid:
    """Rows in one rectangle of b x T tokens."""

    ids: Tensor  # int64 [b, T]
    positions: Tensor  # int64 [b, T], of a token in its own sequence
    mask: Tensor | None  # bool [b, 1, T, T], True where a query may look; None is causal
    before: Tensor  # int64 [n], flat position in b x T of the state before a response token
    token: Tensor  # int64 [n], that token's place in the flat [N]
    last: Tensor  # int64 [m], flat position of a sequence's last token
    sequence: Tensor  # int64 [m], that sequence
    blocks: tuple[ragged.Block, ...] = ()  # of a flat row: what its attention goes by, in place of a mask


def lay_flat(sequences: Sequences, costs: ragged.Costs) -> Grid:
    """Everything in one row, each prompt once."""
    of_prompt = _members(sequences)
    lengths = sequences.lengths.tolist()
    texts = tuple((prompt, tuple(members)) for prompt, members in of_prompt.items())
    tokens = sum(len(sequences.prompts[prompt]) for prompt in of_prompt) + sum(lengths)
    grid, (spans,) = _grid([Row(texts, tokens)], sequences, masked=False)
    return attrs.evolve(grid, blocks=ragged.blocks_of(spans, costs))


def lay_out(sequences: Sequences, *, share: bool | None, single: bool, costs: Costs) -> list[Grid]:
    """Rectangles for every sequence.

    Args:
        share: always, never, or (None) where it costs less.
        single: one rectangle, so that every rank makes the same number of forwards.
    """
    lengths = sequences.lengths.tolist()
    rows: list[Row] = []
    for prompt, members in _members(sequences).items():
        size = len(sequences.prompts[prompt])
        dealt = _deal(members, lengths, size, share, costs)
        rows += [Row(((prompt, tuple(part)),), size + sum(lengths[i] for i in part)) for part in dealt]
    rows.sort(key=lambda row: (row.tokens, row.texts[0][1]))
    return [_grid(part, sequences)[0] for part in ([rows] if single else _batches(rows, costs))]


def _members(sequences: Sequences) -> dict[int, list[int]]:
    """Each prompt's sequences."""
    found: dict[int, list[int]] = {}
    for i, prompt in enumerate(sequences.prompt_of.tolist()):
        found.setdefault(prompt, []).append(i)
    return found


def _deal(members: list[int], lengths: list[int], prompt: int, share: bool | None, costs: Costs) -> list[list[int]]:
    """Deal a prompt's responses over rows: as many rows as cost least, evenly filled."""
    k = len(members)
    if share is False or k == 1:
        return [[i] for i in members]
    total = sum(lengths[i] for i in members)

    def cost(rows: int) -> float:
        return rows * costs.row(prompt + total / rows, shared=rows < k)

    count = 1 if share else min(range(1, k + 1), key=cost)
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(members, key=lambda i: (-lengths[i], i)):  # the longest first, each into the emptiest row
        j = min(range(count), key=lambda j: (filled[j], j))
        rows[j].append(i)
        filled[j] += lengths[i]
    return rows


def _batches(rows: Sequence[Row], costs: Costs) -> list[Sequence[Row]]:
    """Cut rows, sorted by length, where calls and padding together cost least. rows: shortest first."""
    best = [0.0] + [float("inf")] * len(rows)
    cut = [0] * (len(rows) + 1)
    for end in range(1, len(rows) + 1):
        for start in range(end):
            price = best[start] + costs.call + (end - start) * rows[end - 1].tokens
            if price < best[end]:
                best[end], cut[end] = price, start
    parts, end = [], len(rows)
    while end:
        parts.append(rows[cut[end] : end])
        end = cut[end]
    return parts[::-1]


def _grid(rows: Sequence[Row], sequences: Sequences, masked: bool = True) -> tuple[Grid, list[list[ragged.Text]]]:
    """Rows in a rectangle, and where in each of them its texts lie."""
    responses = sequences.responses()
    starts = [0, *sequences.lengths.cumsum(0).tolist()]  # of each response in the flat [N]
    b, width = len(rows), max(row.tokens for row in rows)
    ids = torch.empty(b, width, dtype=torch.long)
    positions = torch.arange(width).repeat(b, 1)
    part = torch.zeros(b, width, dtype=torch.long)  # 0 the prompt, then a number for each response
    before, token, last, sequence = [], [], [], []
    texts: list[list[ragged.Text]] = []
    for r, row in enumerate(rows):
        pieces, at = list[Tensor](), 0
        texts.append([])
        for number, members in row.texts:
            prompt, begin = sequences.prompts[number], at
            end = begin + len(prompt)
            pieces.append(prompt)
            positions[r, begin:end] = torch.arange(len(prompt))
            spans, at = [], end
            for place, i in enumerate(members, start=1):
                size = len(responses[i])
                pieces.append(responses[i])
                positions[r, at : at + size] = torch.arange(len(prompt), len(prompt) + size)
                part[r, at : at + size] = place
                flat = r * width + torch.arange(at - 1, at + size)  # [size + 1]: before each token, and the last one
                flat[0] = r * width + end - 1  # the prompt's end comes before every first token
                before.append(flat[:-1])
                last.append(flat[-1:])
                token.append(torch.arange(starts[i], starts[i] + size))
                sequence.append(i)
                spans.append((at, at + size))
                at += size
            texts[r].append(((begin, end), spans))
        text = torch.cat(pieces)
        ids[r, :at] = text
        ids[r, at:] = text[-1]  # any token would do, none looks right; the pad token may be EOS, or not be there
    mask = None
    if masked and any(len(members) > 1 for row in rows for _, members in row.texts):
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        own = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)  # [b, query, key]
        mask = (own & causal)[:, None]
    grid = Grid(ids, positions, mask, torch.cat(before), torch.cat(token), torch.cat(last), torch.tensor(sequence))
    return grid, texts
