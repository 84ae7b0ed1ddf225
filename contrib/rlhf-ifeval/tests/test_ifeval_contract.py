"""IFEval keeps the contract that anybody's must."""

from __future__ import annotations

import pytest

from rlhf.testing import RewardContract

ROW = {
    "prompt": "mnop ",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 3, "relation": "less than"}],
}
pytestmark = pytest.mark.matrix_full  # it starts runs


class TestIFEval(RewardContract):
    name = "ifeval"
    options = {"partial": True}
    examples = [
        (ROW, "short", 1.0),
        (ROW, "one, two and three", 0.0),
        (ROW, "one and two and three", 0.5),
    ]
