"""Each algorithm with one error fails the test of that error, for that reason, and those that it must fail besides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

MASKED = "test_masked_tokens_have_no_gradient"
LEAK = "test_what_is_said_of_masked_tokens_changes_nothing"
ORDER = "test_the_order_of_groups_changes_nothing"
CUT = "test_micro_batches_add_up"
RANKS = "test_ranks_agree"
BY_RANK = "two ranks make another experience than one"
NUMBERS = {
    "all-tokens": {MASKED: "masked tokens have a gradient in policy.logp"},
    "leaking": {LEAK: "what is said of masked tokens changes the gradient of others in policy.logp"},
    "batch-mean": {CUT: "means must divide by the whole step", RANKS: "the gradient of role 'policy' is another"},
    "cut-groups": {CUT: "a loss that compares the members of a group says unit = 'group'", RANKS: "is another"},
    "own-whitening": {RANKS: BY_RANK},
    "needs-rows": {"test_a_rank_may_have_no_rows": "one without any rows, one fails: RuntimeError: max()"},
    "uncorrected": {"test_samples_of_another_distribution_are_corrected_for": "say policy_mean in place of"},
    "unrequired": {"test_it_requires_what_it_asks_for": "its entry's `requires` must name 'logprobs'"},
    "forgetful": {"test_state_is_plain_and_complete": "after its state is restored it goes on otherwise"},
    "unsaved": {"test_state_is_plain_and_complete": "state '/done' is a set: only JSON values and tensors"},
    "by-place": {ORDER: "the order of groups in the batch changes 'advantages'", RANKS: BY_RANK},
    "all-groups": {"test_groups_may_be_left_out": "with groups of the batch left out it fails"},
    "constant": {"test_the_loss_has_a_gradient": "no gradient in any trained role"},
    "undocumented": {"test_every_option_is_documented": "the option 'coefficient' has no help"},
    "changing": {"test_options_come_back_from_json_and_the_command_line": "can be changed after the plan is made"},
}
"""Name -> every test that it fails, of those without a run, and what is said."""
RUNS = {
    "turned": ("test_it_learns", "a rise below 0.1: a sign that is turned"),
    "worse": ("test_it_learns", "what it is to learn (see `learns`) went from"),
    "forgetful": (
        "test_a_run_that_is_stopped_and_resumed_is_the_same",
        "resumed after 2 steps, the run is another than one never stopped from step 3 on",
    ),
    "clockwork": ("test_a_seed_gives_the_same_numbers", "two runs of one seed differ from step 1 on (loss: "),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    outcome = broken("AlgorithmContract", f"broken-{name}", "not learns and not seed and not resumed and not forwards")
    found = failures(outcome)
    for test, reason in NUMBERS[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
    assert len(outcome) == 18


@pytest.mark.parametrize("name", RUNS)
def test_those_that_only_a_run_finds(name: str, broken: Callable[..., Outcome]) -> None:
    test, reason = RUNS[name]
    found = failures(broken("AlgorithmContract", f"broken-{name}", test))
    assert list(found) == [test]
    assert reason in found[test]


def test_a_class_of_another_kind(broken: Callable[..., Outcome]) -> None:
    found = broken("AlgorithmContract", "broken-kind", "kind")["test_its_class_is_of_its_kind"]
    assert "broken_kit.algorithms:Nothing is no class that derives from rlhf.api.Algorithm" in found


def test_another_api_version(broken: Callable[..., Outcome]) -> None:
    found = broken("AlgorithmContract", "broken-api", "found")["test_it_is_found_and_can_be_used"]
    assert "--algo broken-api: made for plugin API 2, this is 1: install a matching release of it" in found


def test_what_is_not_installed(broken: Callable[..., Outcome]) -> None:
    found = broken("AlgorithmContract", "broken-plian", "found")["test_it_is_found_and_can_be_used"]
    assert "there is no --algo 'broken-plian'" in found
    assert "with an entry point of the group 'rlhf'" in found


def test_a_contract_of_nothing(broken: Callable[..., Outcome]) -> None:
    found = broken("AlgorithmContract", "", "found")["test_it_is_found_and_can_be_used"]
    assert "TestIt must say which component it tests: name = '...'" in found
