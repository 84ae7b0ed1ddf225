"""Tests of what needs a newer release than the oldest that the project admits: `nox -s minimum` skips them, and says
why."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from packaging.version import Version


def needs(name: str, least: str) -> Any:
    """A mark, of a test or a parameter: skipped with an older one. Where there is none, the test says what it needs."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = least
    return pytest.mark.skipif(Version(found) < Version(least), reason=f"needs {name} {least}, and {found} is installed")


FSDP2 = needs("torch", "2.13")
"""What `--backend fsdp2` says itself."""
ADAMW8BIT = needs("bitsandbytes", "0.50")
"""What `--optim adamw8bit` says itself, on a CPU."""
