"""Sequences, scores and ranks made by hand; a model beside the built-in one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from worked import double

from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Context
from rlhf.plan import Plan
from rlhf.scores import Scores
from rlhf.sequences import Rollouts, Sequences
from rlhf.testing.ranks import on_ranks
from rlhf.world import World


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

    def divergence(self, of: Any, role: str, other: str, **how: Any) -> Tensor:
        self.asked.append((f"{role} from {other}: {how}", False))
        return self.roles[role]["divergence"]

    def logp_old(self, rollouts: Rollouts) -> Tensor:
        return self.roles["policy"]["logp"]


@pytest.fixture
def hand() -> Callable[..., HandScore]:
    return HandScore


@pytest.fixture
def context() -> Context:
    """For algorithms that ask nothing of their plan."""
    return Context(plan=cast(Plan, None))


@pytest.fixture(scope="session")
def another_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with noise on its weights, in a folder of its own."""
    folder = tmp_path_factory.mktemp("models") / "another"
    shutil.copytree(tiny_model, folder)
    draw = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    noisy = {name: w + 0.05 * torch.randn(w.shape, generator=draw) for name, w in sorted(weights.items())}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


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
        lengths: Sequence[int],
        rewards: Sequence[float],
        finish: Sequence[str] | None = None,
        masks: Any = None,
        group: Sequence[int] | None = None,
    ) -> Rollouts:
        b = len(lengths)
        return Rollouts(
            sequences_of(lengths, masks, group), None, cast(Any, tuple(finish or ["stop"] * b)), ("row",) * b,
            ("p",) * b, ("t",) * b, ("",) * b, double(rewards),
        )  # fmt: skip

    return make


@pytest.fixture
def pairs() -> Callable[..., Experience]:
    """Pairs of sequences, chosen first: lengths [chosen, rejected, chosen, rejected, ...]."""

    def make(lengths: Sequence[int], **fields: Tensor) -> Experience:
        group = [i // 2 for i in range(len(lengths))]
        return Experience(sequences_of(lengths, group=group), None, **fields)

    return make


@pytest.fixture
def fake_ranks() -> Callable[..., list[Any]]:
    """Do something in each of several ranks at once, threads of this process; returns what each found."""

    def carry_out(*work: Callable[[World], Any]) -> list[Any]:
        return on_ranks(work)

    return carry_out
