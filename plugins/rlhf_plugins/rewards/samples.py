"""What rewards need of a rollout besides its text: how to name it in a message, and its row's columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.api import Rollouts


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
