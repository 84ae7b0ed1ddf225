"""Our own engine keeps the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import EngineContract


class TestHF(EngineContract):
    name = "hf"


ORDER = "test_as_many_as_asked_for_in_order"
SEEDS = "test_a_seed_gives_the_same_response_in_any_company"
GREEDY = "test_temperature_0_is_greedy"
SYNC = "test_new_weights_are_sampled_from"
STATE = "test_state_is_plain_and_complete"
BROKEN = {
    "right": {},
    "backwards": {
        ORDER: "response 0 stands at another prompt",
        SEEDS: "the order of requests changes responses",
        GREEDY: "Sample(greedy=True) isn't what temperature 0 gives",
    },
    "one": {
        ORDER: "the engine returned 3 responses to requests for 6",
        SEEDS: "the order of requests",
        GREEDY: "at temperature 0 two responses to a prompt differ",
    },
    "unseeded": {SEEDS: "asked again with the same seeds, it says otherwise", STATE: "it goes on otherwise"},
    "alike": {"test_seeds_and_responses_differ": "four responses to one request are the same"},
    "inexact": {"test_log_probs_are_what_it_says": "and said to be exact", SYNC: "after sync its log-probs are off"},
    "stale": {SYNC: "after sync it samples from the weights of before"},
    "versionless": {SYNC: "synced to version 7, it says that it samples from version 0"},
    "asking": {"test_nothing_asked_for": "asked for nothing, as a rank may be, it raises ValueError"},
    "hot": {GREEDY: "at temperature 0 a seed changes the response"},
    "unsaved": {STATE: "given its state, it says another"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("EngineContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
