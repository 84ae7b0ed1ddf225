"""A component of each kind that composes and does nothing, and what is asked of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from rlhf.entries import (
    POLICY,
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    Entry,
    FormatEntry,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    RewardEntry,
    Role,
    TrackerEntry,
)
from rlhf.errors import Problem, RequestError
from rlhf.options import option
from rlhf.plan import Component, Plan
from rlhf.recipe import Recipe
from rlhf.rows import PreferenceRow

Typed = Callable[..., Recipe]
Planned = Callable[..., Plan]
IMPL: dict[str, Any] = {"summary": "s", "impl": "fake:Fake"}
REFERENCE = Role("reference", start="policy")


@attrs.frozen(kw_only=True)
class Sampling:
    temperature: float = option(1.0, help="of sampling", ge=0)


@attrs.frozen(kw_only=True)
class Weighed:
    weight: float = option(1.0, help="of it")
    path: str = option(help="where")


@attrs.frozen(kw_only=True)
class Size:
    rank: int = option(16, help="of it", ge=1)


@attrs.frozen(kw_only=True)
class Shape:
    shared: bool = option(False, help="value on the policy's trunk")


def value_of(config: Any) -> tuple[Role, ...]:
    shared = "policy" if config.shared else None
    return (POLICY, REFERENCE, Role("value", trainable=True, head="scalar", start="policy", shares=shared))


def even_rank(plan: Plan, component: Component) -> Iterator[Problem]:
    if component.config.rank % 2:
        yield Problem(f"rank {component.config.rank} is odd", "an even one")


PAIRS = AlgorithmEntry(name="fake-pairs", roles=(POLICY, REFERENCE), data=PreferenceRow, **IMPL)
PAIRS_ALONE = AlgorithmEntry(name="fake-alone", data=PreferenceRow, **IMPL)
ONLINE = AlgorithmEntry(name="fake-online", requires={"rollouts"}, config=Shape, roles=value_of, rank=10, **IMPL)
BASE: tuple[Entry, ...] = (
    PAIRS,
    PAIRS_ALONE,
    ONLINE,
    PolicyEntry(name="fake-policy", rank=10, **IMPL),
    EngineEntry(name="fake-engine", rank=10, config=Sampling, **IMPL),
    EngineEntry(name="fake-far-engine", rank=5, conflicts={"one-process"}, **IMPL),
    RewardEntry(name="fake-reward", config=Weighed, **IMPL),
    RewardEntry(name="fake-judge", roles=(Role("reward", head="scalar", start="given"),), **IMPL),
    MemoryEntry(name="fake-half", phase="load", slot="precision", rank=20, requires={"bf16"}, **IMPL),
    MemoryEntry(name="fake-full", phase="load", slot="precision", rank=10, **IMPL),
    MemoryEntry(name="fake-small", phase="load", slot="quantised", conflicts={"sharded"}, **IMPL),
    MemoryEntry(name="fake-away", phase="load", applies="frozen", **IMPL),
    MemoryEntry(name="fake-wrap", phase="wrap", applies="trainable", **IMPL),
    MemoryEntry(
        name="fake-adapter", phase="adapt", applies="trainable", provides={"adapters"}, config=Size,
        constraints=(even_rank,), **IMPL,
    ),
    OptimizerEntry(name="fake-optim", rank=10, **IMPL),
    OptimizerEntry(name="fake-whole-optim", requires={"whole-gradients"}, **IMPL),
    BackendEntry(name="fake-one", rank=10, provides={"one-process", "whole-gradients"}, **IMPL),
    BackendEntry(name="fake-many", rank=5, provides={"sharded"}, **IMPL),
    FormatEntry(name="fake-lines", suffixes=(".jsonl",), **IMPL),
    FormatEntry(name="fake-table", suffixes=(".csv",), **IMPL),
    FormatEntry(name="fake-hub", suffixes=("/", "hub:"), **IMPL),
    FormatEntry(name="fake-store", **IMPL),  # whose data has names of its own
    LauncherEntry(name="fake-launch", rank=10, **IMPL),
    TrackerEntry(name="fake-track", rank=10, **IMPL),
    TrackerEntry(name="fake-quiet", **IMPL),
)  # fmt: skip


def problems(make: Callable[[], Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make()
    return caught.value


def told(error: RequestError) -> list[str]:
    return [problem.what for problem in error.problems]


def mem(plan: Plan, role: str) -> list[str]:
    return [component.name for component in plan.role(role).mem]


ONLINE_WORDS = ("--reward", "fake-reward", "--reward.fake-reward.path", "p")
