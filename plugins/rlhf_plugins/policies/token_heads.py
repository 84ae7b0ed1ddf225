"""Heads of one number for each token of the vocabulary: read at the tokens that were said, and added to a model's
vocabulary head as it is saved. That is a plain model, which any engine samples from:

logits = W h + sum_k c_k W_k h = (W + sum_k c_k W_k) h
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.api import Problem, RequestError
from rlhf_plugins.policies.chunks import in_chunks
from rlhf_plugins.policies.heads import logit_transform
from rlhf_plugins.policies.trunk import Trunk


def token_numbers(states: Tensor, targets: Tensor, head: nn.Module, chunk: int) -> tuple[Tensor, Tensor]:
    """What a head says of tokens, and the log-softmax of that; at most `chunk` positions at a time.

    Outside autocast, in the head's own precision, as `heads.scalars`.

    Args:
        states: [N, D], before each token.
        targets: int64 [N], the tokens.

    Returns:
        (float32 [N], float32 [N] nats)
    """
    weight = next(head.parameters())

    def part(some: Tensor, tokens: Tensor) -> Tensor:
        with torch.autocast(some.device.type, enabled=False):
            numbers = head(some.to(weight.device, weight.dtype)).float()
        taken = numbers.gather(-1, tokens[:, None]).squeeze(-1)
        return torch.stack([taken, taken - numbers.logsumexp(-1)])

    parts = [states.new_zeros(2, 0, dtype=torch.float32), *in_chunks(part, chunk, states, targets)]
    taken, logp = torch.cat(parts, dim=1)
    return taken, logp


def check_foldable(trunk: Trunk, role: str) -> None:
    """
    Raises:
        RequestError: the model does something to its head's output, so that weights can't be added up.
    """
    some = torch.tensor([1.0, -2.0])
    transform = logit_transform(trunk.model.config.get_text_config())
    if trunk.traits.own_forward or not torch.equal(transform(some), some):
        what = (
            f"role {role!r}: {type(trunk.model).__name__} scales or bends its logits, and a head can't be added to it"
        )
        raise RequestError(Problem(what, "give a model whose logits are its vocabulary head's output"))


def save_folded(model: Any, folder: Path, folded: Sequence[tuple[float, nn.Module]]) -> None:
    """Write a whole model with these heads, each times its factor, in its vocabulary head, which is then its own where
    it was the embedding. The model stays as it is."""
    output = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is output)
    weights = dict(model.state_dict())
    total = output.weight.detach().clone()
    for factor, head in folded:
        total += factor * next(head.parameters()).detach().to(total.device, total.dtype)
    weights[f"{name}.weight"] = total
    config = model.config.get_text_config()
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        config.tie_word_embeddings = tied
