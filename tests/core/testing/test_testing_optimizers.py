"""Our own optimisers keep the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from needs import ADAMW8BIT
from rlhf.testing import OptimizerContract


class TestAdamW(OptimizerContract):
    name = "adamw"
    options = {"weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2}


@ADAMW8BIT
class TestAdamW8bit(OptimizerContract):
    name = "adamw8bit"
    options = {"min_size": 16}  # so that tensors as small as the kit's are packed


RATES = "test_groups_have_their_rates"
FURTHER = "test_a_role_of_a_higher_rate_moves_further"
BROKEN = {
    "one-rate": {
        RATES: "the base_lr of bodies.value.layers.0.matrix (role 'value') is 0.05, not 0.5",
        FURTHER: "a role of ten times the rate moved",
    },
    "uphill": {"test_a_quadratic_falls": "half the sum of squares went from"},
    "fixed-rate": {"test_at_rate_0_nothing_moves": "at factor 0 of the schedule", FURTHER: "steps go by the group's"},
    "decaying": {"test_what_has_no_gradient_stays": ".0.matrix, bodies.policy.layers.0.vector had no gradient"},
    "apart": {"test_state_comes_back_to_the_bit": "layers.0.matrix goes another way in step 1"},
    "pickled": {"test_state_comes_back_to_the_bit": "its state can't be put into a checkpoint"},
    "frozen": {"test_the_schedule_is_a_number": "over 1 steps its schedule is 0 throughout"},
    "right": {},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("OptimizerContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found


def test_groups_without_the_rate_that_is_multiplied(broken: Callable[..., Outcome]) -> None:
    found = failures(broken("OptimizerContract", "broken-no-base", "rates"))
    assert "a group of its optimiser has no base_lr" in found[RATES]
