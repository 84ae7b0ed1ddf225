"""Reading a trunk's states: token log-probs through the vocabulary head in chunks, scalars through a small one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_plugins.policies.chunks import in_chunks

LogitsOf = Callable[[Tensor], Tensor]
"""States [n, D] -> logits [n, V]."""


def token_logps(
    states: Tensor, targets: Tensor, logits_of: LogitsOf, *, temperature: float, entropy: bool, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of tokens, and entropies of the distributions they were drawn from.

    The logits of at most `chunk` positions exist at a time, in the backward too, where they are computed again: at a
    vocabulary of 150,000 the whole of them would outweigh the model.

    Args:
        states: [N, D], before each token.
        targets: int64 [N], the tokens.
        logits_of: the head.
        temperature: divides the logits; above 0.

    Returns:
        (float32 [N] nats, float32 [N] nats or None)
    """

    def part(some: Tensor, tokens: Tensor) -> Tensor:
        return cast(Tensor, _LogSoftmax.apply(logits_of(some), tokens, temperature, entropy))  # type: ignore[no-untyped-call]

    parts = [states.new_zeros(2, 0, dtype=torch.float32), *in_chunks(part, chunk, states, targets)]
    logp, spread = torch.cat(parts, dim=1)
    return logp, spread if entropy else None


class _LogSoftmax(torch.autograd.Function):
    """Log-probs of targets and entropies from logits, in float32, with half of autograd's passes over [n, V].

    With z = logits / temperature, p = softmax(z) and H = -sum p log p:
        d logp / d z = onehot(target) - p        d H / d z = -p (log p + H)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> Tensor:
        """[2, n]: log-probs; entropies, or zeros where they aren't asked for."""
        z = _tempered(logits, temperature)
        log_z = z.logsumexp(-1)
        logp = z.gather(-1, targets[:, None]).squeeze(-1) - log_z
        spread = torch.zeros_like(logp)
        if entropy:
            spread = log_z - (torch.exp(z - log_z[:, None]) * z).sum(-1)  # H = log Z - E[z]
        ctx.save_for_backward(logits, targets, log_z, spread)
        ctx.temperature, ctx.entropy = temperature, entropy
        return torch.stack([logp, spread])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, log_z, spread = ctx.saved_tensors
        of_logp, of_entropy = grads[0] / ctx.temperature  # [n] each
        log_p = _tempered(logits, ctx.temperature)
        log_p = log_p - log_z[:, None] if log_p is logits else log_p.sub_(log_z[:, None])
        if ctx.entropy:
            p = log_p.exp()
            grad = log_p.add_(spread[:, None]).mul_(of_entropy[:, None]).add_(of_logp[:, None]).mul_(p).neg_()
        else:
            grad = log_p.exp_().mul_(-of_logp[:, None])
        grad.scatter_add_(-1, targets[:, None], of_logp[:, None])
        return grad.to(logits.dtype), None, None, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32, with one array of that size and no more; the logits themselves where nothing
    changes."""
    z = logits.float()
    if temperature == 1.0:
        return z
    return z / temperature if z is logits else z.div_(temperature)


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
