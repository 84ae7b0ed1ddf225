"""Our own rewards keep the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import Outcome, failures

from rlhf.testing import RewardContract

FUNCTION = Path(__file__).with_name("reward_function.py")


class TestAnswer(RewardContract):
    name = "answer"
    examples = (
        ({"prompt": "1 + 1 =", "answer": "2"}, "It is 2.", 1.0),
        ({"prompt": "1 + 1 =", "answer": "2"}, "It is 3.", 0.0),
    )


class TestLength(RewardContract):
    name = "length"
    options = {"target": 4, "slope": 0.1}
    examples = (({"prompt": "a"}, "abcde", -0.2), ({"prompt": "a"}, "abc", 0.0))  # each letter a token, and the end


class TestPython(RewardContract):
    name = "python"
    options = {"path": f"{FUNCTION}:score"}
    examples = (({"prompt": "say it", "word": "please"}, "Please!", 1.0), ({"prompt": "x", "word": "y"}, "no", 0.0))


class TestModel(RewardContract):
    """Of the kit's own model with a scalar head."""

    name = "model"


BROKEN = {
    "short": {"test_a_number_for_each_rollout": "returned 19 numbers for 20 rollouts"},
    "by-order": {
        "test_the_order_changes_nothing": "in another order, 'a' is worth",
        "test_a_rollout_is_worth_the_same_alone": "alone, 'ab abc' is worth 0.0, not 1.0",
    },
    "of-the-batch": {"test_a_rollout_is_worth_the_same_alone": "compares = True"},
    "needs-rollouts": {"test_nothing_to_judge": "given no rollouts, as a rank may be, it raises ValueError: max()"},
    "needs-text": {"test_odd_responses": "raised IndexError: string index out of range"},
    "nothing-for-failure": {"test_a_number_for_each_rollout": "returned None for sample"},
    "silent": {"test_a_number_for_each_rollout": "Failed must say why"},
    "meddling": {"test_the_rollouts_stay_as_they_are": "it changes the rows of data that it is shown"},
    "hidden-column": {"test_it_says_which_columns_it_needs": "(none) it fails: reward 'broken-hidden-column' raised"},
    "unsaved": {"test_state_is_plain": "its state can't be put into a checkpoint"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("RewardContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    if name in ("short", "nothing-for-failure"):  # whatever is judged fails
        assert all(BROKEN[name]["test_a_number_for_each_rollout"].split(" ")[0] in said for said in found.values())
    else:
        assert not found


def test_an_example_that_is_worth_something_else(broken: Callable[..., Outcome]) -> None:
    examples = [({"prompt": "a", "answer": "b"}, "abc", 4.0)]
    found = failures(broken("RewardContract", "broken-meddling", "worth", examples=examples))
    assert found.keys() == {"test_what_the_examples_are_worth"}
    assert "'abc' to {'prompt': 'a', 'answer': 'b'} is worth 3.0, not 4.0" in str(found)
