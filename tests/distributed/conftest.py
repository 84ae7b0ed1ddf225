"""Runs of one process to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sharded_cases import recipe

from warm import Ranks


@pytest.fixture(scope="session")
def alone(one: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run directory of one process with the whole batch: made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def run(name: str, lora: bool = False, **more: Any) -> Path:
        key = (name, lora, str(more))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            one(recipe(name, folder, lora=lora, **more), folder / "run")
            made[key] = folder / "run"
        return made[key]

    return run
