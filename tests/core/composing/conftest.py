"""Plans of fake components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_components import (
    BASE,
    Planned,
    Typed,
)

from rlhf.compose import compose
from rlhf.facts import Machine
from rlhf.plan import Plan
from rlhf.registry import Registry


@pytest.fixture
def registry(make_registry: Callable[..., Registry]) -> Registry:
    found = make_registry(*BASE)
    assert not found.warnings
    return found


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("")
    return str(path)


@pytest.fixture
def plan(typed: Typed, registry: Registry, machine: Machine, data: str) -> Planned:
    """Compose a command line; model and data are there unless it names its own."""

    def make(*words: str, on: Machine = machine, among: Registry = registry) -> Plan:
        own_model = any(word == "--model" and "=" not in words[i + 1] for i, word in enumerate(words))
        words += () if own_model else ("--model", "org/base")
        words += () if "--data" in words else ("--data", data)
        return compose(typed(*words), among, on)

    return make
