"""Rollouts made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch

from rlhf.interfaces import Context
from rlhf.plan import Plan
from rlhf.rows import PromptRow
from rlhf.sequences import Rollouts, Sequences


@pytest.fixture
def rollouts() -> Callable[..., Rollouts]:
    def make(
        texts: Sequence[str],
        extra: Sequence[Mapping[str, Any]] | None = None,
        prompts: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Rollouts:
        count = len(texts)
        asked = [f"question {i}" for i in range(count)] if prompts is None else list(prompts)
        columns = [{}] * count if extra is None else list(extra)
        responses = [torch.zeros(n, dtype=torch.long) for n in (lengths or [1] * count)]
        return Rollouts(
            sequences=Sequences.of([torch.zeros(1, dtype=torch.long)] * count, responses, masks=masks),
            logp=None,
            finish=tuple("stop" for _ in range(count)),
            rows=tuple(PromptRow(prompt, dict(column)) for prompt, column in zip(asked, columns, strict=True)),
            prompts=tuple(f"<s>{prompt}" for prompt in asked),
            texts=tuple(texts),
            tags=("",) * count,
            rewards=torch.zeros(count),
        )

    return make


@pytest.fixture
def context() -> Context:
    """For rewards that ask nothing of their run but their name."""
    return Context(plan=cast(Plan, None), label="mine")
