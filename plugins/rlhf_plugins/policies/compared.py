"""Two models' distributions compared over the whole vocabulary, some positions at a time."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf.api import Comparison
from rlhf_plugins.functional.divergence import divergence
from rlhf_plugins.policies.chunks import in_chunks
from rlhf_plugins.policies.heads import LogitsOf


def divergences(states: Tensor, logits_of: LogitsOf, compare: Comparison, chunk: int) -> Tensor:
    """How far the distribution at each position is from the other model's: float32 [N], nats.

    The logits of at most `chunk` positions exist at a time, of each model; in the backward too, where they are computed
    again. Where one head has more rows than the other, those are not tokens of both, and are left out.

    Args:
        states: [N, D], before each token; the other model's are `compare.other.states`, of another width perhaps.
        logits_of: the head.
    """
    other = compare.other

    def part(some: Tensor, theirs: Tensor) -> Tensor:
        ours, others = logits_of(some), other.logits_of(theirs)
        rows = min(ours.shape[-1], others.shape[-1])
        return cast(Tensor, _Divergence.apply(ours[:, :rows], others[:, :rows], compare))  # type: ignore[no-untyped-call]

    empty = states.new_zeros(0, dtype=torch.float32)
    return torch.cat([empty, *in_chunks(part, chunk, states, other.states)])


class _Divergence(torch.autograd.Function):
    """See `functional.divergence`. The slope is found with the value and kept: it is one array of [n, V], where
    autograd would keep five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, others: Tensor, compare: Comparison) -> Tensor:
        """[n]"""
        found, slope = divergence(
            _log_probs(logits, compare.temperature), _log_probs(others, compare.temperature), compare.kind, compare.beta
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slope.div_(compare.temperature).to(logits.dtype))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(slope.dtype), None, None


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    """In float32 at the least: in bfloat16 a divergence of nearly equal distributions is noise."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, -1)
