"""What recipes build, alive, and sequences and rollouts to score."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rlhf import facts
from rlhf.assemble import assemble
from rlhf.compose import compose
from rlhf.parts import Parts
from rlhf.recipe import from_mapping
from rlhf.registry import loaded
from rlhf.sequences import Rollouts, Sequences


def parts_of(**recipe: Any) -> Parts:
    content = {"max_steps": 1, "batch_size": 4, "eval_rows": 0, "mem": "fp32", **recipe}
    return assemble(compose(from_mapping(content, "test"), loaded(), facts.machine()), lambda text: None)


def some(count: int = 5) -> Sequences:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        return torch.randint(5, 300, (n,), generator=generator)

    prompts = [draw(3 + 2 * i) for i in range(count)]
    return Sequences.of(prompts, [draw(2 + (i * 3) % 5) for i in range(count)])


def rollouts_of(sequences: Sequences, logp: Tensor | None, temperature: float = 1.0) -> Rollouts:
    """Unjudged ones, all ended."""
    b = len(sequences)
    empty, finish = ("",) * b, cast(Any, ("stop",) * b)
    return Rollouts(
        sequences, logp, finish, empty, empty, empty, empty, rewards=torch.zeros(b), temperature=temperature
    )
