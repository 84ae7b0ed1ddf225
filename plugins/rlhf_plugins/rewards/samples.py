"""What rewards need of a rollout besides its text: how to name it in a message, and its row's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.api import Rollouts, Sequences


def name(rollouts: Rollouts, i: int) -> str:
    """`sample 3 (prompt '...')`; of a long prompt its two ends, since chats begin alike and texts may end alike."""
    prompt = rollouts.prompts[i]
    short = prompt if len(prompt) <= 90 else f"{prompt[:30]} ... {prompt[-55:]}"
    return f"sample {i} (prompt {short!r})"


def columns(rollouts: Rollouts, i: int) -> Mapping[str, Any]:
    """The columns of the sample's row that the core gives no meaning to, by name."""
    found: Mapping[str, Any] = getattr(rollouts.rows[i], "extra", {})
    return found


def prompt(rollouts: Rollouts, i: int) -> Any:
    """The prompt as the data has it: text, or chat messages; without the policy's template where the row tells."""
    return getattr(rollouts.rows[i], "prompt", rollouts.prompts[i])


def sequences(rollouts: Rollouts, readable: Sequence[tuple[Tensor, Tensor]]) -> Sequences:
    """What a judging model is to score, a prompt object that several share once.

    Of nothing, sequences without rows: scores are asked for all the same, since a model that is spread over ranks
    answers all of them together.

    Args:
        readable: int64 [P] prompt and int64 [R] response of each sample that can be read.
    """
    if not readable:
        return rollouts.sequences.select(torch.zeros(0, dtype=torch.long))
    prompts = {id(prompt): prompt for prompt, _ in readable}
    place = {key: u for u, key in enumerate(prompts)}
    of = [place[id(prompt)] for prompt, _ in readable]
    return Sequences.of(list(prompts.values()), [response for _, response in readable], prompt_of=of)
