"""OPMD keeps the contract that anybody's must."""

from __future__ import annotations

import pytest

from rlhf.testing import AlgorithmContract

pytestmark = pytest.mark.matrix_full  # it starts runs


class TestOPMD(AlgorithmContract):
    name = "opmd"
