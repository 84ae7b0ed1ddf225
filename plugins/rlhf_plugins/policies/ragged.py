"""Sequences end to end in one row, with nothing padded: every matrix product of a model is over real tokens alone.

Only attention needs to know where sequences lie. The row is cut into stretches, each with the earlier parts of the
row that it may look at: a response behind its prompt, however many responses the prompt has; a long text in pieces, so
that less of the square above the diagonal is computed and thrown away. Stretches alike in size share a matrix product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor

Span = tuple[int, int]
"""Start and end of a part of the row."""
Text = tuple[Span, Sequence[Span]]
"""A prompt's span and those of its responses, the first of which begins where the prompt ends."""


@attrs.frozen
class Costs:
    """What attention costs, in units of a token's matrix products in one layer."""

    pair: float
    """A pair of tokens."""
    call: float
    """A product over a block, however small."""
    most: int
    """Pairs that a block may have: so many scores a head are held at once."""


@attrs.frozen
class Stretch:
    """Queries that look at some earlier spans, and at themselves causally."""

    own: Span
    before: tuple[Span, ...] = ()

    @property
    def queries(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def keys(self) -> int:
        return self.queries + sum(end - start for start, end in self.before)


@attrs.frozen(eq=False)
class Block:
    """Stretches that share a matrix product, filled up to one size."""

    stretches: tuple[Stretch, ...]
    query: Tensor  # int64 [n, q], places in the row
    key: Tensor  # int64 [n, k], places in the row
    hidden: Tensor  # bool [n, 1, 1, q, k], True where a query may not look

    @classmethod
    def of(cls, stretches: Sequence[Stretch]) -> Block:
        n, q, k = len(stretches), max(s.queries for s in stretches), max(s.keys for s in stretches)
        query, key = torch.zeros(n, q, dtype=torch.long), torch.zeros(n, k, dtype=torch.long)
        free = torch.empty(n, 1, 1, dtype=torch.long)  # keys before a stretch's own
        for i, stretch in enumerate(stretches):
            at = 0
            for start, end in (*stretch.before, stretch.own):
                key[i, at : at + end - start] = torch.arange(start, end)
                at += end - start
            query[i, : stretch.queries] = torch.arange(*stretch.own)
            free[i] = stretch.keys - stretch.queries
        # A query sees all that is before its stretch, and of its own no later token; what fills up comes later still.
        hidden = torch.arange(k) - free > torch.arange(q)[:, None]
        return cls(tuple(stretches), query, key, hidden[:, None, None])


def blocks_of(texts: Sequence[Text], costs: Costs) -> tuple[Block, ...]:
    """Blocks for prompts and their responses."""
    stretches: list[Stretch] = []
    for prompt, responses in texts:
        first = (prompt[0], responses[0][1])
        stretches += _pieces(first, (), costs)
        for response in responses[1:]:
            stretches += _pieces(response, (prompt,), costs)
    stretches.sort(key=lambda s: (s.queries, s.keys, s.own))
    return tuple(Block.of(part) for part in _together(stretches, costs))


def _pieces(own: Span, before: tuple[Span, ...], costs: Costs) -> list[Stretch]:
    """A span in as many pieces as cost least: c of them compute (c + 1) / 2c of its own square."""
    start, end = own
    length = end - start
    if not length:
        return []
    count = max(1, min(length, round(length * (costs.pair / 2 / costs.call) ** 0.5)))
    keys = length + sum(b - a for a, b in before)
    count = max(count, -(-length * keys // costs.most))
    bounds = [start + length * i // count for i in range(count + 1)]
    found = []
    for a, b in itertools.pairwise(bounds):
        found.append(Stretch((a, b), (*before, (start, a)) if a > start else before))
    return found


def _together(stretches: Sequence[Stretch], costs: Costs) -> list[Sequence[Stretch]]:
    """Cut stretches, sorted by size, where calls and filling up together cost least."""
    best = [0.0] + [float("inf")] * len(stretches)
    cut = [0] * (len(stretches) + 1)
    for end in range(1, len(stretches) + 1):
        keys, queries = 0, stretches[end - 1].queries
        for start in range(end - 1, -1, -1):
            keys = max(keys, stretches[start].keys)
            pairs = (end - start) * queries * keys
            if pairs > costs.most and start < end - 1:
                break
            price = best[start] + costs.call + costs.pair * pairs
            if price < best[end]:
                best[end], cut[end] = price, start
    parts, end = [], len(stretches)
    while end:
        parts.append(stretches[cut[end] : end])
        end = cut[end]
    return parts[::-1]


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scale: float) -> Tensor:
    """softmax(scale Q K^T) V of a row in blocks, grouped query heads.

    Args:
        query: [1, heads, N, d]
        key, value: [1, key heads, N, d]
        blocks: every place of the row is a query of one of them.

    Returns:
        [1, N, heads, d]
    """
    return cast(Tensor, _Attention.apply(query, key, value, tuple(blocks), scale))  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Weights are computed again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        q, k, v = _rows(query), _rows(key), _rows(value)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])  # [N, heads, d]
        for block in blocks:
            grouped = _gather(q, block.query, k.shape[1]).mul_(scale)
            weights = _weights(grouped, _gather(k, block.key, k.shape[1]), block)
            _put(out, torch.bmm(weights, _gather(v, block.key, k.shape[1])), block)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        q, k, v, g = _rows(query), _rows(key), _rows(value), grads[0][0].to(query.dtype)
        shared = k.shape[1]
        of_q = torch.empty_like(q)
        # keys are looked at from several stretches: what they all say is added up in float32
        of_k, of_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for block in ctx.blocks:
            grouped, keys = _gather(q, block.query, shared).mul_(ctx.scale), _gather(k, block.key, shared)
            weights = _weights(grouped, keys, block)
            grad = _gather(g, block.query, shared)
            for i, stretch in enumerate(block.stretches):  # nothing flows from queries that fill up
                grad.view(len(block.stretches), shared, -1, block.query.shape[1], grad.shape[-1])[
                    i, :, :, stretch.queries :
                ] = 0
            _add(of_v, torch.bmm(weights.transpose(1, 2), grad), block)  # sums over the group
            of_weights = torch.bmm(grad, _gather(v, block.key, shared).transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            _put(of_q, torch.bmm(of_scores, keys), block)
            _add(of_k, torch.bmm(of_scores.transpose(1, 2), grouped), block)
        of_q.mul_(ctx.scale)
        return _heads(of_q), _heads(of_k.to(key.dtype)), _heads(of_v.to(value.dtype)), None, None


def _rows(x: Tensor) -> Tensor:
    """[1, heads, N, d] -> [N, heads, d]"""
    return x[0].transpose(0, 1)


def _heads(x: Tensor) -> Tensor:
    """[N, heads, d] -> [1, heads, N, d]"""
    return x.transpose(0, 1)[None]


def _gather(x: Tensor, places: Tensor, shared: int) -> Tensor:
    """[N, heads, d] at places [n, L] -> [n x shared, group x L, d], a copy."""
    n, length = places.shape
    taken = x.index_select(0, places.flatten()).view(n, length, shared, -1, x.shape[-1])
    return taken.permute(0, 2, 3, 1, 4).reshape(n * shared, -1, x.shape[-1])


def _put(out: Tensor, found: Tensor, block: Block) -> None:
    """Write [n x shared, group x q, d] to the block's queries in out: [N, heads, d]."""
    n, q = block.query.shape
    ordered = found.view(n, -1, q, found.shape[-1]).transpose(1, 2)  # [n, q, heads, d]
    for part, stretch in zip(ordered, block.stretches, strict=True):
        out[slice(*stretch.own)] = part[: stretch.queries]


def _add(total: Tensor, found: Tensor, block: Block) -> None:
    """Add [n x shared, k, d] to the block's keys in total: [N, shared, d]."""
    n, k = block.key.shape
    ordered = found.view(n, -1, k, found.shape[-1]).transpose(1, 2)  # [n, k, shared, d]
    for part, stretch in zip(ordered, block.stretches, strict=True):
        at = 0
        for start, end in (*stretch.before, stretch.own):
            total[start:end] += part[at : at + end - start]
            at += end - start


def _weights(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """[n x shared, group x q, k]"""
    scores = torch.bmm(q, k.transpose(1, 2))
    (n, count), width = block.query.shape, block.key.shape[1]
    # the lowest number, not -inf: a query that fills up may see nothing, and must not become NaN
    scores.view(n, -1, q.shape[1] // count, count, width).masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)
