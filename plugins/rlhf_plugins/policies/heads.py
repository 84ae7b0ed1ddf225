"""Reading a trunk's hidden states: token log-probs through the vocabulary head in chunks, scalars through a small one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LogitsOf = Callable[[Tensor], Tensor]
"""Hidden states [n, D] -> logits [n, V]."""


def token_logps(
    hidden: Tensor, targets: Tensor, logits_of: LogitsOf, *, temperature: float, entropy: bool, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of tokens, and entropies of the distributions they were drawn from.

    The logits of at most `chunk` positions exist at a time, in the backward too, where they are computed again: at a
    vocabulary of 150,000 the whole of them would outweigh the model.

    Args:
        hidden: [N, D], states before each token.
        targets: int64 [N], the tokens.
        logits_of: the head.
        temperature: divides the logits; above 0.

    Returns:
        (float32 [N] nats, float32 [N] nats or None)
    """

    def part(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(states).float() / temperature  # [n, V]
        log_z = logits.logsumexp(-1)  # [n]
        logp = logits.gather(-1, tokens[:, None]).squeeze(-1) - log_z
        if not entropy:
            return logp, None
        return logp, log_z - (torch.softmax(logits, -1) * logits).sum(-1)  # H = log Z - E[logit]

    parts: list[tuple[Tensor, Tensor | None]] = []
    for states, tokens in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():  # nothing random inside, so no RNG to keep
            again = checkpoint(part, states, tokens, use_reentrant=False, preserve_rng_state=False)
            parts.append(cast("tuple[Tensor, Tensor | None]", again))
        else:
            parts.append(part(states, tokens))
    if not parts:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if entropy else None
    logp = torch.cat([logp for logp, _ in parts])
    return logp, torch.cat([cast(Tensor, h) for _, h in parts]) if entropy else None


def scalars(hidden: Tensor, head: nn.Module) -> Tensor:
    """One number a position: [n, D] -> float32 [n].

    Outside autocast, in the head's own precision: bfloat16 would leave a score two or three digits, and saves nothing.
    """
    weight = next(head.parameters())
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(Tensor, head(hidden.to(weight.device, weight.dtype))).squeeze(-1).float()


def init_scalar_head(head: nn.Module, init: str, seed: int) -> None:
    """Fill a linear head D -> 1: "zero", or "normal" with standard deviation 1/sqrt(D+1); the bias is 0 in both.

    The square root is Stiennon et al.'s code's (2020); their paper's text dropped it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            value = torch.zeros(parameter.shape)
            if init == "normal" and parameter.dim() == 2:
                value.normal_(0.0, 1.0 / math.sqrt(parameter.shape[1] + 1), generator=generator)
            parameter.copy_(value)


def logit_transform(config: Any) -> LogitsOf:
    """What a model does to its head's output, by its config: a scale (Cohere, Granite) or a soft cap (Gemma)."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform
