"""Our own backend of one process keeps the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import BackendContract


class TestSingle(BackendContract):
    name = "single"


SUM = "test_gradients_are_the_sum_over_micro_batches"
NORM = "test_the_norm_is_that_of_all_gradients"
INFINITE = "test_what_is_not_finite_is_not_applied"
RUN = "test_a_run_is_the_plain_one"
STATE = "test_state_comes_back_to_the_bit"
WEIGHTS = "test_weights_are_all_of_a_module"
BROKEN = {
    "right": {},
    "mean": {SUM: "bodies.policy.matrix moved 0.3333 times as far as it must"},
    "each-clipped": {NORM: "that of all gradients together is", RUN: "of one process"},
    "keeping": {
        "test_gradients_are_cleared": "of a second step, bodies.policy.matrix moved",
        INFINITE: "of the step after one that was skipped",
        STATE: "restored, and a step later",
        RUN: "of one process",
    },
    "applying": {
        SUM: "moved 2 times as far as it must",
        NORM: "of gradients clipped to a norm of .1",
        INFINITE: "gradients that aren't finite were applied",
        RUN: "of one process",
    },
    "strict": {"test_a_loss_may_be_constant": "a loss without a gradient raises RuntimeError"},
    "parameters": {WEIGHTS: "weights() leaves out embedding"},
    "everything": {WEIGHTS: "asked for the matrix alone, weights() gives matrix, bias, embedding"},
    "forgetful": {STATE: "what the optimiser keeps of each"},
    "turned": {"test_forward_answers_each_request_in_order": "its scores aren't in the order asked for"},
    "constant": {SUM: "moved 2 times as far as it must"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("BackendContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
