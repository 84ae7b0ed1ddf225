"""Contracts carried out on components that break them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import Outcome, carry_out, offer_to_registry

HERE = Path(__file__).parent
_number = itertools.count()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Hold a component of the package `broken_kit` to the contract of its kind: broken("AlgorithmContract", "name")."""
    offer_to_registry(monkeypatch, tmp_path, HERE / "broken", "broken-kit", "broken_kit")

    def hold(contract: str, name: str, only: str = "", **attributes: Any) -> Outcome:
        """only: names of tests, as pytest's -k takes them."""
        said = "".join(f"    {key} = {value!r}\n" for key, value in attributes.items())
        file = tmp_path / f"test_{next(_number)}.py"  # of no other's name: modules are kept by theirs
        file.write_text(
            f"from rlhf.testing import {contract}\n\n\nclass TestIt({contract}):\n    name = {name!r}\n{said}"
        )
        return carry_out(file, *(("-k", only) if only else ()))

    return hold
