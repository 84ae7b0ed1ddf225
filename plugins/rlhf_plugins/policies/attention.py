"""Attention on a CPU, faster than what is offered to transformers: by matrix products, query heads grouped by key head.

- Of a single new token, transformers repeats keys and values for every query head once there is a mask, which for one
  token is most of the work. Here the query heads of a group become rows of one query: 3 to 15 times faster at three
  query heads a key head (100 to 300 tokens, float32 and bfloat16).
- Of many tokens in bfloat16, torch's fused kernel reaches a tenth of what the chip does in matrix products. Scores,
  softmax and sums as products of their own take 2.4 to 7 times less time, forward and backward (64 to 512 tokens; 1.25
  times less at 2048). The scores are rounded to bfloat16, as in transformers' own `eager`; log-probs of a 135M model
  stray from float32's no further than with the fused kernel (mean .027 nats in both, which the other products cause).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_plugins.policies import MOST_SCORES, ragged

NAME = "rlhf_grouped"
BLOCKS = "rlhf_blocks"
"""What a model's forward passes on to attention where sequences stand in one row: `ragged.Block`s."""
MOST = MOST_SCORES
"""Beyond, in a rectangle, the fused kernel, which holds none; a flat row is cut in pieces."""


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers. query: [n, heads, q, d]; key, value: [n, key heads, T, d].

    Returns:
        ([n, q, heads, d], None)
    """
    n, heads, count, d = query.shape
    shared, width = key.shape[1], key.shape[2]
    if count == 1 and heads != shared and kwargs.get("position_bias") is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query.view(n, shared, heads // shared, d), key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(n, 1, heads, -1), None
    if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":  # rotary positions leave float32 behind
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    blocks = kwargs.pop(BLOCKS, None)
    plain = not any(kwargs.get(name) for name in ("dropout", "softcap")) and kwargs.get("position_bias") is None
    square = attention_mask is None and count == width and getattr(module, "is_causal", True)
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    if blocks is not None:
        if not plain or n != 1:
            raise ValueError("attention with dropout, caps or a bias of its own can't be laid out flat")
        return ragged.attend(query, key, value, blocks, scaling if scaling is not None else d**-0.5), None
    half = query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.device.type == "cpu"
    if half and plain and count > 1 and (square or masked) and n * heads * count * width <= MOST:
        hidden = _causal(count) if attention_mask is None else ~attention_mask
        scale = scaling if scaling is not None else d**-0.5
        return cast(Tensor, _Products.apply(query, key, value, hidden, scale)).transpose(1, 2), None  # type: ignore[no-untyped-call]
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return found, None


class _Products(torch.autograd.Function):
    """softmax(scale Q K^T) V for groups of query heads. Weights are computed again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """hidden: bool, broadcast to [n, heads, q, T]; True where a query may not look. Returns [n, heads, q, d]."""
        n, heads, count, d = query.shape
        shared, width = key.shape[1], key.shape[2]
        q = (query * scale).reshape(n * shared, -1, d)  # [n x key heads, group x q, d]
        k, v = key.reshape(n * shared, width, d), value.reshape(n * shared, width, -1)
        ctx.save_for_backward(q, k, v, hidden)
        ctx.shape, ctx.scale = (n, shared, heads // shared, count, width), scale
        return torch.bmm(_weights(q, k, hidden, ctx.shape), v).view(n, heads, count, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, hidden = ctx.saved_tensors
        n, shared, group, count, width = ctx.shape
        weights = _weights(q, k, hidden, ctx.shape)
        grad = grads[0].to(q.dtype).reshape(n * shared, group * count, -1)
        of_value = torch.bmm(weights.transpose(1, 2), grad)  # sums over the group
        of_weights = torch.bmm(grad, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = torch.bmm(of_scores, k).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), q)
        return (
            of_query.view(n, shared * group, count, -1),
            of_key.view(n, shared, width, -1),
            of_value.view(n, shared, width, -1),
            None,
            None,
        )


def _weights(q: Tensor, k: Tensor, hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n x key heads, group x q, T]"""
    scores = torch.bmm(q, k.transpose(1, 2))
    n, shared, group, count, width = shape
    # the lowest number, not -inf: a query of padding may see nothing, and must not become NaN
    lowest = torch.finfo(scores.dtype).min
    if hidden.ndim == 4 and hidden.shape[1] == 1:
        hidden = hidden[:, :, None]  # [n, 1, 1, q, T]
    elif hidden.ndim == 4:
        hidden = hidden.reshape(n, shared, group, count, width)
    scores.view(n, shared, group, count, width).masked_fill_(hidden, lowest)
    return torch.softmax(scores, -1)


def _causal(count: int) -> Tensor:
    """bool [q, T], True for what comes later."""
    return torch.ones(count, count, dtype=torch.bool).triu_(1)


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def grouped(model: Any) -> Iterator[None]:
    """While sampling, a model that uses `sdpa` uses this."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
