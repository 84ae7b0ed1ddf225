"""Our own trackers keep the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import TrackerContract


class TestConsole(TrackerContract):
    name = "console"


class TestTensorBoard(TrackerContract):
    name = "tensorboard"


BROKEN = {
    "needs-rollouts": {
        "test_it_hears_of_an_offline_run": "a run drops it: tracker NeedsRollouts failed at run_finished",
        "test_it_hears_of_a_run_that_is_resumed": "a run drops it",
        "test_what_it_hears_stays_as_it_is": "",
        "test_odd_numbers_and_names": "it raises AttributeError",
        "test_a_run_that_fails": "it raises AttributeError",
    },
    "meddling": {"test_what_it_hears_stays_as_it_is": "it changes the metrics that it is told"},
    "strict": {"test_odd_numbers_and_names": "it raises ValueError: Out of range float values"},
    "drawing": {"test_the_run_stays_as_it_is": "with it, a run's numbers are others than without it"},
    "late": {"test_a_run_that_fails": "it raises AttributeError"},
    "fresh": {"test_it_hears_of_a_run_that_is_resumed": "failed at step_finished and is dropped: ValueError: step 3"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("TrackerContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
