"""Frozen weights that run after trained ones, and plans in which they can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from at_work import Run, plan_of
from rlhf.entries import Follows
from rlhf.errors import RequestError
from rlhf.followers import Followers
from rlhf.plan import plan_from_json
from rlhf.registry import loaded


def made(own: float, other: float) -> tuple[nn.Linear, nn.Linear]:
    modules = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for module, value in zip(modules, (own, other), strict=True):
        module.weight.data.fill_(value)
    return modules


def test_they_come_nearer_by_a_rate_after_every_so_many_steps() -> None:
    own, other = made(8.0, 0.0)
    followers = Followers()
    followers.add("target", Follows("q", rate=0.25, every=2), own, other, copy=False)
    seen = []
    for _ in range(4):
        followers.stepped()
        seen.append(own.weight.item())
    assert seen == [8.0, 6.0, 6.0, 4.5] and other.weight.item() == 0.0


def test_a_rate_of_1_copies_and_they_may_begin_as_copies() -> None:
    own, other = made(8.0, 3.0)
    followers = Followers()
    followers.add("target", Follows("q"), own, other, copy=True)
    assert own.weight.item() == 3.0
    other.weight.data.fill_(0.1)
    followers.stepped()
    assert torch.equal(own.weight, other.weight)
    other.weight.data = torch.full((1, 1), 7.0)  # weights may be moved elsewhere, such as into a buffer of all
    followers.stepped()
    assert own.weight.item() == 7.0


def test_their_state_holds_weights_and_the_count() -> None:
    own, other = made(8.0, 0.0)
    followers, again = Followers(), Followers()
    followers.add("target", Follows("q", rate=0.5, every=2), own, other, copy=False)
    for _ in range(3):
        followers.stepped()
    back, _ = made(0.0, 0.0)
    again.add("target", Follows("q", rate=0.5, every=2), back, other, copy=False)
    again.load_state(followers.state())
    assert back.weight.item() == 4.0
    again.stepped()
    assert back.weight.item() == 2.0
    assert Followers().state() == {}
    Followers().load_state({})  # of a checkpoint of a run that has none


def test_another_model_is_refused() -> None:
    with pytest.raises(RequestError, match="weights of other names or shapes"):
        Followers().add("reference", Follows("policy"), nn.Linear(1, 1), nn.Linear(1, 2), copy=False)


def test_a_reference_is_renewed(tmp_path: Path) -> None:
    """After the second of three steps it is the policy as that was then."""
    algo = {"name": "online-dpo", "renew_every": 2}
    run = Run(tmp_path, plan_of(algo=algo, batch_size=8, max_steps=3))
    models: Any = run.parts.models
    seen: list[tuple[torch.Tensor, ...]] = []
    stepped = models.followers.stepped

    def noting() -> None:
        stepped()
        seen.append(tuple(models.body(r).model.norm.weight.detach().clone() for r in ("policy", "reference")))

    models.followers.stepped = noting
    start = models.body("reference").model.norm.weight.detach().clone()
    run.go()
    policies, references = zip(*seen, strict=True)
    assert torch.equal(references[0], start) and not torch.equal(policies[1], start)
    assert torch.equal(references[1], policies[1]) and torch.equal(references[2], policies[1])
    assert not torch.equal(policies[2], policies[1])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"mem": "lora"}, "whose weights are adapters on a base that stays"),
        ({"roles": {"reference": {"mem": ["fp32", "offload"]}}}, "--mem offload changes that"),
        ({"backend": "fsdp2", "nproc": 2}, "whose weights no rank has whole"),
    ],
    ids=str,
)
def test_plans_in_which_a_reference_cannot_be_renewed(more: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        plan_of(algo={"name": "online-dpo", "renew_every": 2}, **more)


def test_a_plan_read_again_knows_whom_they_follow() -> None:
    plan = plan_of(algo={"name": "online-dpo", "renew_every": 2})
    again = plan_from_json(json.loads(json.dumps(plan.to_json())), loaded())
    assert again.role("reference").role == plan.role("reference").role
    assert again.role("reference").role.follows == Follows("policy", every=2)
    assert again.role("policy").role.follows is None
