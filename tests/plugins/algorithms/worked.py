"""What the tests of algorithms work out by hand: a group of two responses, a codec of words, and exact comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.experience import Batch, Experience

EXACT: dict[str, Any] = {"rel": 1e-12, "abs": 1e-12}  # float64 after a few operations

# A group of two, of 3 and 1 tokens; and the policy some way off.
LENGTHS = [3, 1]
OLD = [-1.0, -0.5, -2.0, -0.7]
NEW = [-0.6, -0.55, -2.5, -0.2]
REF = [-1.1, -0.7, -1.5, -0.7]
RHO = [math.exp(n - o) for n, o in zip(NEW, OLD, strict=True)]


def double(values: Sequence[float], gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def close(found: Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, **EXACT)


def of_group(rollouts: Callable[..., Any], batch: Callable[..., Batch], advantages: Sequence[float]) -> Batch:
    """The two responses as a step's only micro-batch. rollouts, batch: the fixtures of that name."""
    made = rollouts(LENGTHS, [1.0, 0.0], group=[0, 0])
    return batch(Experience(made, {"logp_old": double(OLD)}, advantages=double(advantages)))


class Words:
    """A `Codec` by which a text is its length, and a completion to "why" ends with 0."""

    eos = 0

    def prompt(self, prompt: Any) -> Tensor:
        return torch.tensor([len(prompt)])

    def response(self, text: str, prompt: Any = "", *, end: bool = True) -> Tensor:
        assert prompt == "why" and end
        return torch.tensor([len(text), 0])
