"""Completions in steps, as a process reward model reads them: each step is closed by a separator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.api import Codec, RowError


def encode(
    codec: Codec, prompt: Any, steps: Sequence[str], separator: str, longest: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(int64 [P] prompt, int64 [R] steps with their separators, bool [R] True on each step's last token).

    Each step is encoded by itself, so that no token belongs to two of them. A step that holds the separator is
    refused: a response is cut there when it is judged, so what was learnt of the whole would say nothing.

    Args:
        longest: tokens that a sequence may have; None: any number.

    Raises:
        RowError: it is longer, holds the separator, or can't be encoded.
    """
    for number, step in enumerate(steps, 1):
        if separator in step:
            raise RowError(f"step {number} holds the separator {separator!r}")
    before = codec.prompt(prompt)
    parts = [codec.response(step + separator, prompt, end=False) for step in steps]
    response = torch.cat(parts)
    if longest is not None and len(before) + len(response) > longest:
        raise RowError(f"prompt and steps are longer than the {longest} tokens that the model reads")
    ends = torch.zeros(len(response), dtype=torch.bool)
    ends[torch.tensor([len(part) for part in parts]).cumsum(0) - 1] = True
    return before, response, ends


def split(text: str, separator: str) -> list[str]:
    """The steps of a text, blank ones left out."""
    return [step for step in text.split(separator) if step.strip()]
