"""Which memory strategies act on which role, in which order, and which roles share a module."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
from fake_components import (
    BASE,
    ONLINE_WORDS,
    PAIRS,
    REFERENCE,
    Planned,
    Weighed,
    mem,
    problems,
    told,
)

from rlhf.entries import (
    POLICY,
    Role,
)
from rlhf.registry import Registry


def test_strategies_act_by_phase_whatever_the_order_typed(plan: Planned) -> None:
    one = plan("--algo", "fake-alone", "--mem", "fake-wrap,fake-adapter,fake-full")
    other = plan("--algo", "fake-alone", "--mem", "fake-full", "--mem", "fake-adapter,fake-wrap")
    assert mem(one, "policy") == mem(other, "policy") == ["fake-full", "fake-adapter", "fake-wrap"]
    assert one == other


def test_a_strategy_goes_to_the_roles_that_it_is_for(plan: Planned) -> None:
    made = plan("--algo", "fake-pairs", "--mem", "fake-wrap,fake-away")
    assert mem(made, "policy") == ["fake-half", "fake-wrap"]
    assert mem(made, "reference") == ["fake-away", "fake-half"]


def test_a_roles_own_choice_replaces_what_was_said_for_all_but_for_open_slots(plan: Planned) -> None:
    made = plan(*ONLINE_WORDS, "--mem", "fake-wrap,fake-full", "--mem", "value=fake-small")
    assert mem(made, "policy") == ["fake-full", "fake-wrap"]
    assert mem(made, "value") == ["fake-full", "fake-small"]
    assert mem(plan(*ONLINE_WORDS, "--mem", "value=fake-full"), "value") == ["fake-full"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--mem", "fake-away"), "--mem fake-away would do nothing: it is for none of policy"),
        (
            ("--mem", "fake-wrap", "--mem", "policy=fake-adapter"),
            "--mem fake-wrap would do nothing: every role it is for has a choice of its own",
        ),
    ],
)
def test_a_strategy_that_no_role_takes_is_refused(plan: Planned, words: tuple[str, ...], what: str) -> None:
    assert told(problems(lambda: plan("--algo", "fake-alone", *words))) == [what]


def test_a_role_that_is_not_there(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--model", "rewrad=a/b"))
    assert told(error) == ["fake-pairs has no role 'rewrad' in this combination"]
    assert error.problems[0].fix == "its roles: policy, reference"


def test_a_frozen_role_borrows_the_policy_with_its_adapters_off(plan: Planned) -> None:
    made = plan("--algo", "fake-pairs", "--mem", "fake-adapter")
    assert (made.role("reference").module, made.role("reference").view) == ("policy", "adapters-off")
    assert any("adapters off" in note for note in made.notes)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "nothing to turn off"),
        (("--mem", "fake-adapter", "--mem", "reference=fake-full"), "it has memory strategies of its own"),
        (("--mem", "fake-adapter", "--model", "reference=org/other"), "it is another model"),
        (("--mem", "fake-adapter,fake-away"), "what was said for frozen roles would be lost"),
        (
            ("--mem", "fake-full", "--mem", "policy=fake-adapter,fake-half"),
            "it was said to be in full precision, and the policy isn't",
        ),
    ],
)
def test_a_frozen_role_has_a_module_of_its_own_where_borrowing_would_change_it(
    plan: Planned, words: tuple[str, ...], why: str
) -> None:
    role = plan("--algo", "fake-pairs", *words).role("reference")
    assert (role.module, role.view) == ("reference", "own"), why


def test_only_a_frozen_role_with_the_same_head_borrows(make_registry: Callable[..., Registry], plan: Planned) -> None:
    roles = (
        POLICY,
        Role("twin", trainable=True, start="policy"),
        Role("judge", head="scalar", start="policy"),
        Role("teacher"),  # starts at the run's model, which the policy may not
        REFERENCE,
    )
    registry = make_registry(*BASE, attrs.evolve(PAIRS, name="fake-odd", roles=roles))
    made = plan("--algo", "fake-odd", "--mem", "fake-adapter", among=registry)
    borrowing = {role.name for role in made.roles if role.view == "adapters-off"}
    assert borrowing == {"reference"}


def test_a_head_on_a_trunk(plan: Planned) -> None:
    made = plan(*ONLINE_WORDS, "--algo.shared", "--mem", "fake-adapter")
    assert (made.role("value").module, made.role("value").view) == ("policy", "trunk")
    assert made.role("value").mem == made.role("policy").mem
    assert plan(*ONLINE_WORDS).role("value").view == "own"
    for own in (("--model", "value=a/b"), ("--mem", "value=fake-full")):
        error = problems(lambda own=own: plan(*ONLINE_WORDS, "--algo.shared", *own))  # type: ignore[misc]
        assert told(error) == ["role value is a head on policy's trunk: it has no model or --mem of its own"]


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ((Role("policy", trainable=True, start="elsewhere"),), "starts from a role 'elsewhere' that is not there"),
        ((POLICY, Role("value", trainable=True, shares="nobody")), "a head on a role 'nobody' that is not there"),
        ((POLICY, Role("value", shares="policy")), "only one of the two is trained"),
        ((Role("a", trainable=True, start="b"), Role("b", start="a")), "start from one another"),
    ],
)
def test_roles_that_cannot_be(
    make_registry: Callable[..., Registry], plan: Planned, roles: tuple[Role, ...], what: str
) -> None:
    registry = make_registry(*BASE, attrs.evolve(PAIRS, name="fake-odd", roles=roles))
    assert any(what in text for text in told(problems(lambda: plan("--algo", "fake-odd", among=registry))))


def test_roles_may_be_declared_in_any_order(make_registry: Callable[..., Registry], plan: Planned) -> None:
    roles = (Role("value", trainable=True, head="scalar", shares="policy", start="reference"), REFERENCE, POLICY)
    made = plan("--algo", "fake-odd", among=make_registry(*BASE, attrs.evolve(PAIRS, name="fake-odd", roles=roles)))
    assert {role.name: role.view for role in made.roles} == {"policy": "own", "reference": "own", "value": "trunk"}
    assert {role.model.path for role in made.roles} == {"org/base"}


def test_labelled_rewards_bring_roles_of_their_labels(plan: Planned) -> None:
    words = ("--reward", "fake-judge:helpful", "--reward", "fake-judge:safe")
    made = plan(*words, "--model", "helpful=org/a", "--model", "safe=org/b", "--mem", "safe=fake-full")
    assert [component.key for component in made.rewards] == ["helpful", "safe"]
    assert (made.role("helpful").model.path, made.role("safe").model.path) == ("org/a", "org/b")
    assert (mem(made, "helpful"), mem(made, "safe")) == (["fake-half"], ["fake-full"])
    error = problems(lambda: plan(*words))
    assert [problem.fix for problem in error.problems] == [
        "give it with --model helpful=PATH",
        "give it with --model safe=PATH",
    ]


def test_two_of_one_sort_without_labels(plan: Planned) -> None:
    error = problems(lambda: plan("--reward", "fake-judge,fake-judge", "--model", "reward=org/a"))
    assert "--reward fake-judge is given twice" in told(error)
    assert any(problem.fix == "tell them apart: --reward fake-judge:LABEL" for problem in error.problems)


def test_a_labelled_rewards_options_are_under_its_label(plan: Planned) -> None:
    words = ("--reward", "fake-reward:kind", "--reward", "fake-reward:safe")
    options = ("--reward.kind.path", "a", "--reward.safe.path", "b", "--reward.safe.weight", "2")
    assert [c.config for c in plan(*words, *options).rewards] == [Weighed(path="a"), Weighed(path="b", weight=2.0)]
    assert told(problems(lambda: plan(*words, *options, "--reward.fake-reward.weight", "2"))) == [
        "--reward.fake-reward.weight: the run has no --reward fake-reward"
    ]
