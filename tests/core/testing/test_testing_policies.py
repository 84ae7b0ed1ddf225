"""Our own policy keeps the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import PolicyContract


class TestHF(PolicyContract):
    name = "hf"


SAVED = "test_what_is_saved_is_the_model"
BROKEN = {
    "unnormalised": {"test_log_probs_are_a_distributions": "probabilities of the next token add up to 2.71828"},
    "cold": {"test_log_probs_are_a_distributions": "temperature 2 doesn't halve the logits"},
    "padded": {"test_a_sequence_scores_the_same_in_any_batch": "sequence 0 alone scores otherwise than in a batch"},
    "detached": {"test_gradients_reach_the_weights": "no gradient reaches bodies.policy.unused", SAVED: "RequestError"},
    "unended": {"test_text_comes_back": "a response isn't closed by the codec's `eos`"},
    "fresh": {SAVED: "loaded again, the saved model's log-probs are off by"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("PolicyContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
