"""Freezing keeps the contract that anybody's must."""

from __future__ import annotations

import pytest

from rlhf.testing import MemoryContract

pytestmark = pytest.mark.matrix_full  # it starts runs


class TestFreeze(MemoryContract):
    name = "freeze"
    options = {"layers": 1}
