"""Composition, on small fake components and on what is installed: a plan, or every reason why there is none."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from rlhf.compose import chosen_entries, compose
from rlhf.entries import (
    POLICY,
    AlgorithmEntry,
    BackendEntry,
    EngineEntry,
    Entry,
    FormatEntry,
    LauncherEntry,
    MemoryEntry,
    OptimizerEntry,
    PolicyEntry,
    RewardEntry,
    Role,
    StarterEntry,
    TrackerEntry,
)
from rlhf.errors import Problem, RequestError
from rlhf.facts import Machine
from rlhf.options import option
from rlhf.plan import Component, Plan
from rlhf.recipe import Pick, Recipe, RoleRecipe, from_mapping
from rlhf.registry import Registry
from rlhf.rows import PreferenceRow, PromptRow

Typed = Callable[..., Recipe]
Planned = Callable[..., Plan]
IMPL: dict[str, Any] = {"summary": "s", "impl": "fake:Fake"}
REFERENCE = Role("reference", start="policy")


@attrs.frozen(kw_only=True)
class Sampling:
    temperature: float = option(1.0, help="of sampling", ge=0)


@attrs.frozen(kw_only=True)
class Weighed:
    weight: float = option(1.0, help="of it")
    path: str = option(help="where")


@attrs.frozen(kw_only=True)
class Size:
    rank: int = option(16, help="of it", ge=1)


@attrs.frozen(kw_only=True)
class Shape:
    shared: bool = option(False, help="value on the policy's trunk")


def value_of(config: Any) -> tuple[Role, ...]:
    shared = "policy" if config.shared else None
    return (POLICY, REFERENCE, Role("value", trainable=True, head="scalar", start="policy", shares=shared))


def even_rank(plan: Plan, component: Component) -> Iterator[Problem]:
    if component.config.rank % 2:
        yield Problem(f"rank {component.config.rank} is odd", "an even one")


PAIRS = AlgorithmEntry(name="fake-pairs", roles=(POLICY, REFERENCE), data=PreferenceRow, **IMPL)
PAIRS_ALONE = AlgorithmEntry(name="fake-alone", data=PreferenceRow, **IMPL)
ONLINE = AlgorithmEntry(name="fake-online", requires={"rollouts"}, config=Shape, roles=value_of, rank=10, **IMPL)
BASE: tuple[Entry, ...] = (
    PAIRS,
    PAIRS_ALONE,
    ONLINE,
    PolicyEntry(name="fake-policy", rank=10, **IMPL),
    EngineEntry(name="fake-engine", rank=10, config=Sampling, **IMPL),
    EngineEntry(name="fake-far-engine", rank=5, conflicts={"one-process"}, **IMPL),
    RewardEntry(name="fake-reward", config=Weighed, **IMPL),
    RewardEntry(name="fake-judge", roles=(Role("reward", head="scalar", start="given"),), **IMPL),
    MemoryEntry(name="fake-half", phase="load", slot="precision", rank=20, requires={"bf16"}, **IMPL),
    MemoryEntry(name="fake-full", phase="load", slot="precision", rank=10, **IMPL),
    MemoryEntry(name="fake-small", phase="load", slot="quantised", conflicts={"sharded"}, **IMPL),
    MemoryEntry(name="fake-away", phase="load", applies="frozen", **IMPL),
    MemoryEntry(name="fake-wrap", phase="wrap", applies="trainable", **IMPL),
    MemoryEntry(
        name="fake-adapter", phase="adapt", applies="trainable", provides={"adapters"}, config=Size,
        constraints=(even_rank,), **IMPL,
    ),
    OptimizerEntry(name="fake-optim", rank=10, **IMPL),
    OptimizerEntry(name="fake-whole-optim", requires={"whole-gradients"}, **IMPL),
    BackendEntry(name="fake-one", rank=10, provides={"one-process", "whole-gradients"}, **IMPL),
    BackendEntry(name="fake-many", rank=5, provides={"sharded"}, **IMPL),
    FormatEntry(name="fake-lines", suffixes=(".jsonl",), **IMPL),
    FormatEntry(name="fake-table", suffixes=(".csv",), **IMPL),
    FormatEntry(name="fake-hub", suffixes=("/", "hub:"), **IMPL),
    LauncherEntry(name="fake-launch", rank=10, **IMPL),
    TrackerEntry(name="fake-track", rank=10, **IMPL),
    TrackerEntry(name="fake-quiet", **IMPL),
)  # fmt: skip


@pytest.fixture
def registry(make_registry: Callable[..., Registry]) -> Registry:
    found = make_registry(*BASE)
    assert not found.warnings
    return found


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("")
    return str(path)


@pytest.fixture
def plan(typed: Typed, registry: Registry, machine: Machine, data: str) -> Planned:
    """Compose a command line; model and data are there unless it names its own."""

    def make(*words: str, on: Machine = machine, among: Registry = registry) -> Plan:
        own_model = any(word == "--model" and "=" not in words[i + 1] for i, word in enumerate(words))
        words += () if own_model else ("--model", "org/base")
        words += () if "--data" in words else ("--data", data)
        return compose(typed(*words), among, on)

    return make


def problems(make: Callable[[], Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        make()
    return caught.value


def told(error: RequestError) -> list[str]:
    return [problem.what for problem in error.problems]


def mem(plan: Plan, role: str) -> list[str]:
    return [component.name for component in plan.role(role).mem]


ONLINE_WORDS = ("--reward", "fake-reward", "--reward.fake-reward.path", "p")


# What nobody named


def test_where_nothing_is_named_the_highest_rank_among_the_legal_is_taken(plan: Planned, machine: Machine) -> None:
    made = plan(*ONLINE_WORDS)
    names = (made.algo.name, made.policy.name, made.optim.name, made.backend.name, made.launch.name)
    assert names == ("fake-online", "fake-policy", "fake-optim", "fake-one", "fake-launch")
    assert made.engine is not None
    assert made.engine.name == "fake-engine"
    assert [component.name for component in made.trackers] == ["fake-track"]  # rank 0 is never taken unasked
    assert mem(made, "policy") == ["fake-half"]
    plain = attrs.evolve(machine, cpu_flags=frozenset({"avx2"}))
    assert mem(plan(*ONLINE_WORDS, on=plain), "policy") == ["fake-full"]


def test_a_choice_makes_way_for_what_the_named_need(plan: Planned) -> None:
    assert plan(*ONLINE_WORDS, "--engine", "fake-far-engine").backend.name == "fake-many"
    error = problems(lambda: plan(*ONLINE_WORDS, "--engine", "fake-far-engine", "--backend", "fake-one"))
    assert told(error) == ["--engine fake-far-engine excludes 'one-process'"]


def test_what_was_taken_unasked_is_noted(plan: Planned) -> None:
    notes = plan(*ONLINE_WORDS, "--backend", "fake-one").notes
    assert "--algo fake-online: taken because none was named" in notes
    assert "--engine fake-engine: taken because none was named" in notes
    assert not any("--backend" in note for note in notes)


def test_defaults_of_the_algorithm_then_yaml_then_flags(
    make_registry: Callable[..., Registry], typed: Typed, machine: Machine, data: str, tmp_path: Path
) -> None:
    algo = attrs.evolve(
        PAIRS, name="fake-set", defaults={"mem.fake-adapter.rank": 8, "batch_size": 4, "engine.no-such-thing": 1}
    )
    registry = make_registry(*BASE, algo)
    recipe = tmp_path / "r.yaml"
    words = ["--algo", "fake-set", "--mem", "fake-adapter", "--model", "org/base", "--data", data]
    made = compose(typed(*words), registry, machine)
    assert (made.mem[-1].config, made.run.batch_size) == (Size(rank=8), 4)
    recipe.write_text("mem: [{name: fake-adapter, rank: 6}]\nbatch_size: 5")
    made = compose(typed(str(recipe), *words), registry, machine)
    assert (made.mem[-1].config, made.run.batch_size) == (Size(rank=6), 5)
    made = compose(typed(str(recipe), *words, "--mem.fake-adapter.rank", "2", "--batch-size", "7"), registry, machine)
    assert (made.mem[-1].config, made.run.batch_size) == (Size(rank=2), 7)


def test_trackers_that_listen_unasked_are_joined_by_the_named_and_silenced_by_none(
    plan: Planned, registry: Registry, machine: Machine, data: str
) -> None:
    def trackers(*words: str) -> list[str]:
        return [component.name for component in plan("--algo", "fake-pairs", *words).trackers]

    assert trackers() == ["fake-track"]
    assert trackers("--track", "fake-quiet") == ["fake-track", "fake-quiet"]
    assert trackers("--track", "none") == []
    silent = plan("--algo", "fake-pairs", "--track", "none")
    assert compose(from_mapping(silent.to_recipe(), "again.yaml"), registry, machine).trackers == ()
    # a suggestion says it again
    error = problems(lambda: plan("--algo", "fake-pairs", "--track", "none", "--mem", "fake-half,fake-full"))
    assert "--track none" in error.suggestion


# What doesn't fit


def test_a_need_that_nothing_meets_names_who_would(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--optim", "fake-whole-optim", "--backend", "fake-many"))
    assert told(error) == ["--optim fake-whole-optim needs 'whole-gradients', which nothing provides"]
    assert error.problems[0].fix == "add one that does: --backend fake-one"


def test_a_need_of_the_machine(plan: Planned, machine: Machine) -> None:
    plain = attrs.evolve(machine, cpu_flags=frozenset())
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-half", on=plain))
    assert told(error) == ["--mem fake-half needs 'bf16', which nothing provides (role policy)"]
    assert error.problems[0].fix == "nothing installed here, nor this machine, does"
    assert error.suggestion.startswith("rlhf run --algo fake-alone --model")


def test_conflicts_are_of_the_role_not_of_the_run(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-small", "--backend", "fake-many"))
    assert told(error) == ["--mem fake-small excludes 'sharded' (role policy)"]
    assert plan("--algo", "fake-alone", "--mem", "fake-small").backend.name == "fake-one"


def test_a_strategy_may_exclude_others_that_give_what_it_gives(
    make_registry: Callable[..., Registry], plan: Planned
) -> None:
    jealous = MemoryEntry(name="fake-jealous", phase="adapt", provides={"adapters"}, conflicts={"adapters"}, **IMPL)
    registry = make_registry(*BASE, jealous)
    assert mem(plan("--algo", "fake-alone", "--mem", "fake-jealous", among=registry), "policy")[-1] == "fake-jealous"
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-jealous,fake-adapter", among=registry))
    assert told(error) == ["--mem fake-jealous excludes 'adapters' (role policy)"]
    apart = ("--mem", "policy=fake-adapter", "--mem", "reference=fake-jealous")
    assert mem(plan("--algo", "fake-pairs", *apart, among=registry), "reference")[-1] == "fake-jealous"


def test_a_slot_holds_one(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--mem", "fake-half,fake-full"))
    # one mistake is one problem, however many roles it is a mistake for
    assert told(error) == ["--mem fake-full and fake-half: a role has one precision (roles policy, reference)"]


def test_roles_share_a_problem_only_where_it_is_the_same(plan: Planned, machine: Machine) -> None:
    plain = attrs.evolve(machine, cpu_flags=frozenset())
    words = ("--mem", "fake-full", "--mem", "policy=fake-half", "--mem", "value=fake-half,fake-full")
    assert told(problems(lambda: plan(*ONLINE_WORDS, *words, on=plain))) == [
        "--mem fake-half needs 'bf16', which nothing provides (roles policy, value)",
        "--mem fake-full and fake-half: a role has one precision (role value)",
    ]


def test_a_strategy_acts_once_on_a_role(plan: Planned, registry: Registry, machine: Machine, data: str) -> None:
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-adapter:a,fake-adapter:b"))
    assert told(error) == ["--mem fake-adapter acts twice on one role (role policy)"]
    twice = {"mem": [{"name": "fake-adapter", "rank": rank} for rank in (2, 4)], "model": "org/base", "data": data}
    error = problems(lambda: compose(from_mapping({"algo": "fake-alone", **twice}, "r.yaml"), registry, machine))
    assert told(error) == ["--mem fake-adapter acts twice on one role (role policy)"]
    same = plan("--algo", "fake-alone", "--mem", "fake-wrap:a,fake-adapter:a")
    assert mem(same, "policy") == ["fake-half", "fake-adapter", "fake-wrap"]  # a label of two sorts loses neither
    assert mem(plan("--algo", "fake-alone", "--mem", "fake-wrap", "--mem", "fake-wrap"), "policy")[1:] == ["fake-wrap"]


def test_constraints_see_the_plan(plan: Planned) -> None:
    words = ("--algo", "fake-pairs", "--mem", "fake-adapter", "--mem.fake-adapter.rank")
    error = problems(lambda: plan(*words, "3"))
    assert told(error) == ["rank 3 is odd"]
    assert error.problems[0].fix == "an even one"
    assert plan(*words, "4").role("policy").mem[-1].config == Size(rank=4)


def test_constraints_see_every_roles_own_options(plan: Planned) -> None:
    words = (*ONLINE_WORDS, "--mem", "policy=fake-adapter:even", "--mem", "value=fake-adapter:odd")
    options = ("--mem.even.rank", "2", "--mem.odd.rank", "3")
    assert told(problems(lambda: plan(*words, *options))) == ["rank 3 is odd"]


def test_a_constraint_that_raises_is_told_with_its_distribution(
    make_registry: Callable[..., Registry], plan: Planned
) -> None:
    def raises(plan: Plan, component: Component) -> Iterable[Problem]:
        raise KeyError("heads")

    broken = MemoryEntry(name="fake-broken", phase="wrap", constraints=(raises,), **IMPL)
    registry = make_registry(*BASE, broken)
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-broken", among=registry))
    assert told(error) == ["--mem fake-broken (from fake-package 1.0): its check failed: KeyError: 'heads'"]
    # tried on the way to a suggestion, it harms nobody
    error = problems(lambda: plan("--algo", "fake-alone", "--mem", "fake-half,fake-full", among=registry))
    assert error.suggestion


def test_all_problems_at_once(plan: Planned, tmp_path: Path) -> None:
    error = problems(
        lambda: plan(
            "--algo", "fake-pairs", "--mem", "fake-adaptr", "--mem.fake-wrap.x", "1", "--model", str(tmp_path),
            "--data", "no.jsonl", "--batch-size", "0", "--max-steps", "soon",
        )
    )  # fmt: skip
    parts = ("no --mem 'fake-adaptr'", "--mem.fake-wrap.x", "holds no model", "no.jsonl", "--batch-size must be >= 1",
             "--max-steps must be int")  # fmt: skip
    assert len(error.problems) == len(parts)
    for part in parts:
        assert any(part in what for what in told(error)), part
    assert error.suggestion == ""  # no other combination mends these


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--algo", "fake-pears", "--algo.beta", "1"), ["there is no --algo 'fake-pears'"]),
        (("--reward", "fake-rewrd"), ["there is no --reward 'fake-rewrd'"]),
        (("--engine", "fake-none", "--engine.temperature", "1", *ONLINE_WORDS), ["there is no --engine 'fake-none'"]),
        (
            ("--algo", "fake-online", "--algo.sharde", "1", *ONLINE_WORDS),
            ["unknown option --algo.sharde"],
        ),
        (("--algo", "fake-pairs", "--engine.temperature", "1"), ["--engine.temperature: the run has no --engine"]),
    ],
)  # fmt: skip
def test_one_mistake_is_one_problem(plan: Planned, words: tuple[str, ...], what: list[str]) -> None:
    assert told(problems(lambda: plan(*words))) == what


def test_messages_write_options_as_help_does(
    make_registry: Callable[..., Registry], plan: Planned, tmp_path: Path
) -> None:
    config = attrs.make_class("C", {"in_bytes": option(1, help="of it")})
    registry = make_registry(*BASE, EngineEntry(name="fake-sized", config=config, **IMPL))
    words = ("--engine", "fake-sized", *ONLINE_WORDS)
    error = problems(lambda: plan(*words, "--engine.in_byte", "1", among=registry))
    assert str(error) == "unknown option --engine.in-byte\n    did you mean --engine.in-bytes?"
    error = problems(lambda: plan("--algo", "fake-pairs", "--engine.in_bytes", "1", among=registry))
    assert told(error) == ["--engine.in-bytes: the run has no --engine"]


def test_a_label_where_none_can_be(plan: Planned) -> None:
    assert told(problems(lambda: plan("--algo", "fake-pairs:x"))) == ["--algo fake-pairs: the label 'x' can't be used"]
    error = problems(lambda: plan("--reward", "fake-judge:a.b"))
    assert "--reward fake-judge: the label 'a.b' can't be used" in told(error)


def test_an_offline_algorithm_takes_no_engine_and_no_reward(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--engine", "fake-engine", "--reward", "fake-judge",
                                  "--model", "reward=org/judge"))  # fmt: skip
    assert [what.partition(":")[0] for what in told(error)] == ["--engine fake-engine", "--reward fake-judge"]
    assert plan("--algo", "fake-pairs").engine is None


def test_a_later_attempt_does_not_hide_why_the_first_failed(
    make_registry: Callable[..., Registry], plan: Planned
) -> None:
    # fake-engine has an option that the next engine to be tried hasn't
    first = EngineEntry(name="fake-first", rank=20, config=Sampling, conflicts={"one-process"}, **IMPL)
    second = EngineEntry(name="fake-second", rank=1, **IMPL)
    kept = [entry for entry in BASE if entry.kind != "engine"]
    words = (*ONLINE_WORDS, "--backend", "fake-one", "--engine.temperature", "1")
    error = problems(lambda: plan(*words, among=make_registry(*kept, first, second)))
    assert told(error) == ["--engine fake-first excludes 'one-process'"]


# Suggestions


def test_the_nearest_legal_combination_can_be_pasted(plan: Planned, typed: Typed, data: str) -> None:
    words = ("--algo", "fake-alone", "--mem", "fake-small", "--backend", "fake-many", "--mem.fake-adapter.rank", "2",
             "--mem", "fake-adapter", "--seed", "3", "--model", "org/it")  # fmt: skip
    error = problems(lambda: plan(*words))
    line = error.suggestion.split()
    assert line[:2] == ["rlhf", "run"]
    mended = plan(*line[2:])
    # one change away: everything else that was said is still said
    assert (mended.algo.name, mended.backend.name, mended.run.seed) == ("fake-alone", "fake-many", 3)
    assert mem(mended, "policy") == ["fake-half", "fake-adapter"]
    assert mended.mem[-1].config == Size(rank=2)
    assert mended.role("policy").model.path == "org/it"
    assert mended.data[0].path == data


def test_options_go_with_the_component_that_a_suggestion_drops(plan: Planned) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--engine", "fake-engine", "--engine.temperature", "0.5"))
    assert "--algo fake-pairs" in error.suggestion
    assert "engine" not in error.suggestion


# Memory strategies and roles


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


# Data and the starter


def test_formats_are_found_by_file_name_folders_and_hub_ids_too(plan: Planned, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "folder").mkdir()
    words = [word for path in (str(tmp_path / "a.csv"), str(tmp_path / "folder"), "org/Set-3.1-Pro") for word in
             ("--data", path)]  # fmt: skip
    made = plan("--algo", "fake-pairs", *words)
    assert [source.format.name for source in made.data] == ["fake-table", "fake-hub", "fake-hub"]
    named = plan("--algo", "fake-pairs", "--format", "fake-lines", *words)
    assert [source.format.name for source in named.data] == ["fake-lines"] * 3


@pytest.mark.parametrize("path", ["no.jsonl", "./no", "a/b/c", "/no/where", "org/no.csv"])
def test_data_that_is_not_there(plan: Planned, path: str) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--data", path))
    assert told(error) == [f"--data {path}: there is no such file"]
    error = problems(lambda: plan("--algo", "fake-pairs", "--eval-data", path))
    assert told(error) == [f"--eval-data {path}: there is no such file"]


def test_data_that_no_format_claims(plan: Planned, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("")
    error = problems(lambda: plan("--algo", "fake-pairs", "--data", str(tmp_path / "a.xyz")))
    assert "no format claims it" in told(error)[0]
    assert "fake-table (.csv)" in error.problems[0].fix


def test_data_is_kept_absolute_so_that_a_run_can_be_resumed_from_elsewhere(
    plan: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    assert plan("--algo", "fake-pairs", "--data", "a.jsonl").data[0].path == str(tmp_path / "a.jsonl")


STARTER = StarterEntry(
    name="fake-start", summary="", data_type=PromptRow, model="starter/model", data="starter-data.jsonl",
    eval_data="starter-eval.jsonl", with_model={"mem": "fake-full", "seed": 1},
    with_data={"reward": "fake-plain", "engine.temperature": 0.25}, with_both={"max_steps": 5, "batch_size": 2},
)  # fmt: skip


@pytest.fixture
def started(
    make_registry: Callable[..., Registry], machine: Machine, typed: Typed, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Planned:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("starter-data.jsonl", "starter-eval.jsonl", "own.jsonl"):
        (tmp_path / name).write_text("")
    registry = make_registry(*BASE, RewardEntry(name="fake-plain", **IMPL), starters=(STARTER,))
    return lambda *words: compose(typed(*words), registry, machine)


def settings(plan: Plan) -> dict[str, Any]:
    assert plan.engine is not None
    return {
        "model": plan.role("policy").model.path, "mem": mem(plan, "policy")[0], "seed": plan.run.seed,
        "reward": [c.name for c in plan.rewards], "temperature": plan.engine.config.temperature,
        "steps": plan.run.max_steps, "batch": plan.run.batch_size,
    }  # fmt: skip


THEIRS = {"model": "starter/model", "mem": "fake-full", "seed": 1}
FRESH = {"mem": "fake-half", "seed": 0}


def test_the_starter_stands_in_for_what_is_left_out(started: Planned) -> None:
    made = started()
    assert settings(made) == {**THEIRS, "reward": ["fake-plain"], "temperature": 0.25, "steps": 5, "batch": 2}
    assert [Path(source.path).name for source in (*made.data, *made.eval_data)] == [
        "starter-data.jsonl",
        "starter-eval.jsonl",
    ]


@pytest.mark.parametrize("flag", ["org/base", "policy=org/base"])
def test_a_model_of_ones_own_replaces_just_that_part(started: Planned, flag: str) -> None:
    made = started("--model", flag)
    assert settings(made) == {**FRESH, "model": "org/base", "reward": ["fake-plain"], "temperature": 0.25,
                              "steps": None, "batch": 32}  # fmt: skip
    assert Path(made.data[0].path).name == "starter-data.jsonl"


def test_another_roles_model_leaves_the_starters(started: Planned) -> None:
    assert started("--model", "value=org/base").run.max_steps == 5


def test_data_of_ones_own_replaces_just_that_part_and_a_reward_is_asked_for(started: Planned) -> None:
    error = problems(lambda: started("--data", "own.jsonl"))
    assert [what.partition(":")[0] for what in told(error)] == ["--reward is needed"]
    made = started("--data", "own.jsonl", "--reward", "fake-plain")
    assert settings(made) == {**THEIRS, "reward": ["fake-plain"], "temperature": 1.0, "steps": None, "batch": 32}
    assert made.eval_data == ()


def test_what_the_user_says_goes_before_the_starters_settings(started: Planned) -> None:
    made = started("--max-steps", "9", "--engine.temperature", "0.5", "--mem", "fake-half", "--seed", "0")
    assert (made.run.max_steps, made.run.batch_size, made.run.seed) == (9, 2, 0)
    assert settings(made)["temperature"] == 0.5
    assert mem(made, "policy") == ["fake-half"]


def test_without_a_starter_model_and_data_are_asked_for(registry: Registry, machine: Machine, typed: Typed) -> None:
    error = problems(lambda: compose(typed("--algo", "fake-pairs"), registry, machine))
    assert told(error) == [
        "the role 'policy' needs a model",
        "--data is needed: fake-pairs has no data of its own to start from",
    ]
    assert error.problems[0].fix == "give it with --model PATH"
    assert "preference pairs" in error.problems[1].fix


def test_nothing_installed(make_registry: Callable[..., Registry], machine: Machine) -> None:
    assert told(problems(lambda: compose(Recipe(), make_registry(), machine))) == ["no algorithm is installed"]


# Help


def test_help_shows_what_is_named_even_where_it_lacks_an_option(registry: Registry, typed: Typed) -> None:
    found = chosen_entries(
        typed("--reward", "fake-reward:mine", "--mem", "value=fake-adapter", "--format", "fake-lines"), registry
    )
    assert set(found["reward"]) == {"mine"}  # what its options are addressed by
    assert set(found["mem"]) == {"fake-adapter", "fake-half"}
    assert set(found["format"]) == {"fake-lines"}
    assert set(found["algo"]) == {"fake-online"}
    with pytest.raises(RequestError, match="there is no --engine 'x'"):
        chosen_entries(typed("--engine", "x"), registry)


# What is installed


def test_any_mix_of_what_is_installed_is_a_plan_or_a_request_error(
    installed: Registry, tiny_model: Path, machine: Machine
) -> None:
    draw = random.Random(0)

    def names(kind: str) -> list[str]:
        return [offer.name for offer in installed.offers_of(kind)]

    values: list[Any] = ["0", "-1", "0.5", "8", "true", "none", "x", "1e9", None, [], {}]
    accepted, slowest = 0, 0.0
    for _ in range(200):
        picks: dict[str, tuple[Pick, ...]] = {"algo": (Pick(draw.choice(names("algo"))),)}
        for kind, most in (("mem", 3), ("reward", 2), ("track", 2), ("engine", 1), ("backend", 1), ("optim", 1)):
            count = draw.choice((0, 0, *range(most + 1)))
            picks[kind] = tuple(Pick(draw.choice(names(kind))) for _ in range(count))
        options: dict[str, dict[str, Any]] = {}
        for kind, chosen in picks.items():
            for pick in chosen:
                entry = installed.find(kind, pick.name)
                if isinstance(entry, Entry) and entry.config is not None and draw.random() < 0.2:
                    field = draw.choice(attrs.fields(entry.config)).name
                    prefix = f"{kind}.{pick.name}" if kind in ("mem", "reward", "track") else kind
                    options[prefix] = {field: draw.choice(values)}
        roles = {
            draw.choice(("policy", "reference", "value", "reward")): RoleRecipe(
                draw.choice((None, str(tiny_model))), draw.choice((None, (Pick(draw.choice(names("mem"))),)))
            )
            for _ in range(draw.choice((0, 0, 1, 2)))
        }
        run = {draw.choice(("nproc", "batch_size", "epochs")): draw.choice(values)} if draw.random() < 0.1 else {}
        recipe = Recipe(picks=picks, options=options, roles=roles, run=run)
        start = time.perf_counter()
        try:
            made = compose(recipe, installed, machine)
        except RequestError as error:
            assert error.problems
            assert all(problem.what for problem in error.problems)
        else:
            accepted += 1
            again = compose(from_mapping(made.to_recipe(), "again.yaml"), installed, machine)
            assert again.to_recipe() == made.to_recipe()
        slowest = max(slowest, time.perf_counter() - start)
    assert accepted > 20
    # A refused mix tries up to 400 others at well under a millisecond each; the rest is for a busy machine.
    assert slowest < 1.0
