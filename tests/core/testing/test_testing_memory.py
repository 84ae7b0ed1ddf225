"""Our own memory strategies keep the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import MemoryContract


class TestFp32(MemoryContract):
    name = "fp32"


class TestLora(MemoryContract):
    name = "lora"


class TestCheckpointing(MemoryContract):
    name = "checkpointing"


class TestEma(MemoryContract):
    name = "ema"
    options = {"decay": 0.5}


class TestOffload(MemoryContract):
    name = "offload"


@pytest.mark.matrix_full
class TestFourBit(MemoryContract):
    name = "4bit"
    beside = ("lora",)
    tolerance = 0.8  # 16 values a block of 64 weights, all of them random
    saved_tolerance = (
        2.0  # the adapters were trained on what 4 bits leave of the base, and are saved for the whole of it
    )


@pytest.mark.matrix_full
class TestEightBit(MemoryContract):
    name = "8bit"
    beside = ("lora",)
    tolerance = 0.1  # 255 values a row
    saved_tolerance = 0.1  # as above


RESUMED = "test_a_run_that_is_stopped_and_resumed_is_the_same"
PLAIN = "test_training_is_the_plain_one"
BROKEN = {
    "right": {},
    "shrinking": {
        "test_the_forward_is_the_models": "log-probs of role 'policy' are off by 0.1",
        PLAIN: "the loss of step 1 is",
    },
    "drifting": {
        "test_only_what_is_trained_changes": "bodies.reference.model.embed_tokens.weight changed, and isn't trained",
        PLAIN: "the loss of step 2 is",
        RESUMED: "its numbers are others",
    },
    "other": {"test_what_is_saved_is_the_trained_model": "loaded again, the saved model's log-probs are off by"},
    "forgetful": {RESUMED: "the model to save is another: what it keeps beside the weights goes into its state()"},
    "slowing": {PLAIN: "the loss of step 3 is"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    found = failures(broken("MemoryContract", f"broken-{name}", "not light"))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
