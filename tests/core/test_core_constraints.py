"""The files of constraints beside pyproject.toml say nothing else than it does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[2]
TOOLS = {"dev", "docs"}
"""Extras of who works on this, not of who uses it."""
Requirements = dict[str, list[Requirement]]


@pytest.fixture(scope="module")
def wanted() -> Requirements:
    """What the package needs, and what each extra of its users adds, by name; `all` names the other extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(need for name, of in extras.items() if name not in TOOLS for need in of)]
    found: Requirements = {}
    for requirement in map(Requirement, texts):
        if requirement.name != project["name"]:
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def pinned(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    return bound


def test_the_oldest_are_the_lower_bounds(wanted: Requirements) -> None:
    """Each dependency is held at its lower bound, and nothing else is held."""
    bounds = {name: min(map(lower_bound, of)) for name, of in wanted.items()}
    assert pinned("constraints-minimum.txt") == bounds


def test_the_usual_are_within_the_bounds(wanted: Requirements) -> None:
    for name, version in pinned("constraints.txt").items():
        assert all(version in requirement.specifier for requirement in wanted[name]), name
