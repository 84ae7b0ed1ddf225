"""Our own launcher keeps the contract that anybody's must; what breaks it fails for its own reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from breaking import Outcome, failures

from rlhf.testing import LauncherContract


class TestLocal(LauncherContract):
    name = "local"


TOLD = "test_every_rank_is_told_who_it_is"
ENDS = "test_a_rank_that_fails_ends_the_run"
BROKEN = {
    "right": {},
    "first": {TOLD: "of two ranks, rank-0 was started", ENDS: "when a rank fails, the exit code is 0"},
    "silent": {TOLD: "rank 0 isn't told MASTER_ADDR, MASTER_PORT"},
    "content": {ENDS: "when a rank fails, the exit code is 0"},
    "patient": {ENDS: "when a rank fails, the other one goes on for"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_fails_for_its_own_reason(name: str, broken: Callable[..., Outcome]) -> None:
    more = {"seconds": 1.0} if name in ("patient", "first") else {}
    found = failures(broken("LauncherContract", f"broken-{name}", "not light", **more))
    for test, reason in BROKEN[name].items():
        assert test in found and reason in found.pop(test)
    assert not found
