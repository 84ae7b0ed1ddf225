"""Muon keeps the contract that anybody's must."""

from __future__ import annotations

import pytest

from rlhf.testing import OptimizerContract

pytestmark = pytest.mark.matrix_full  # it starts runs


class TestMuon(OptimizerContract):
    name = "muon"
    options = {"weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2}
