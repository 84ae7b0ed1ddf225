"""Sequences, scores and ranks made by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlhf.interfaces import Context, World
from rlhf.plan import Plan
from rlhf.sequences import Batch, Experience, Rollouts, Scores, Sequences, Totals


def double(values: Sequence[float], gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


class HandScore:
    """A `Score` whose every number was written down: role -> fields of `Scores`, without their underscore."""

    def __init__(self, **roles: Mapping[str, Tensor]) -> None:
        self.roles = roles
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, of: Any, role: str, *, entropy: bool = False) -> Scores:
        self.asked.append((role, entropy))
        fields = {name: value for name, value in self.roles[role].items() if entropy or name != "entropy"}
        return Scores(role, **{f"{name}_": value for name, value in fields.items()})

    def together(self, of: Any, *roles: str, entropy: bool = False) -> tuple[Scores, ...]:
        return tuple(self(of, role, entropy=entropy) for role in roles)

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        return self.roles["policy"]["logp"]


@pytest.fixture
def hand() -> Callable[..., HandScore]:
    return HandScore


@pytest.fixture
def context() -> Context:
    """For algorithms that ask nothing of their plan."""
    return Context(plan=cast(Plan, None))


def sequences_of(lengths: Sequence[int], masks: Sequence[Any] | None = None, group: Any = None) -> Sequences:
    responses = [torch.arange(n) for n in lengths]
    return Sequences.of([torch.tensor([9])] * len(lengths), responses, masks=masks, group=group)


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """All of an experience as the step's only micro-batch."""

    def make(experience: Experience) -> Batch:
        sequences = experience.sequences
        return Batch(experience, Totals(sequences.token_count, len(sequences), sequences.group_count))

    return make


@pytest.fixture
def rollouts() -> Callable[..., Rollouts]:
    def make(
        lengths: Sequence[int], rewards: Sequence[float], finish: Sequence[str] | None = None, masks: Any = None
    ) -> Rollouts:
        b = len(lengths)
        return Rollouts(
            sequences_of(lengths, masks), None, cast(Any, tuple(finish or ["stop"] * b)), ("row",) * b, ("p",) * b,
            ("t",) * b, ("",) * b, double(rewards),
        )  # fmt: skip

    return make


@pytest.fixture
def pairs() -> Callable[..., Experience]:
    """Pairs of sequences, chosen first: lengths [chosen, rejected, chosen, rejected, ...]."""

    def make(lengths: Sequence[int], **fields: Tensor) -> Experience:
        group = [i // 2 for i in range(len(lengths))]
        return Experience(sequences_of(lengths, group=group), None, **fields)

    return make


class _FakeWorld(World):
    """A rank among threads of this process."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).sum(0)


@pytest.fixture
def fake_ranks() -> Callable[..., list[Any]]:
    """Do something in each of several ranks at once; returns what each found."""

    def carry_out(*work: Callable[[World], Any]) -> list[Any]:
        board: list[Any] = [None] * len(work)
        barrier = threading.Barrier(len(work), timeout=20)
        found: list[Any] = [None] * len(work)
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                found[rank] = work[rank](_FakeWorld(rank, len(work), board, barrier))
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    return carry_out
