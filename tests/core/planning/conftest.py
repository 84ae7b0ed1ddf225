"""A model that is a config.json alone, and plans of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_plans import CONFIG, GIB, Make, entries

from rlhf.compose import compose
from rlhf.facts import Gpu, Machine
from rlhf.plan import Plan
from rlhf.recipe import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of which there is nothing but a config.json, and a data file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


@pytest.fixture
def planned(folder: Path, typed: Callable[..., Recipe], make_registry: Make, machine: Machine) -> Callable[..., Plan]:
    def make(*words: str, of: tuple[Any, ...] = (), gpus: int = 0) -> Plan:
        there = attrs.evolve(machine, gpus=(Gpu("fake-gpu", 8 * GIB, (9, 0)),) * gpus)
        recipe = typed("--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), *words)
        return compose(recipe, make_registry(*(of or entries())), there)

    return make
