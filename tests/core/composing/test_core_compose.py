"""Composition, on small fake components and on what is installed: a plan, or every reason why there is none."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_components import (
    BASE,
    IMPL,
    ONLINE_WORDS,
    PAIRS,
    Planned,
    Sampling,
    Size,
    Typed,
    mem,
    problems,
    told,
)

from rlhf.compose import compose
from rlhf.entries import (
    EngineEntry,
    Entry,
    MemoryEntry,
)
from rlhf.errors import Problem, RequestError
from rlhf.facts import Gpu, Machine
from rlhf.options import option
from rlhf.plan import Component, Plan
from rlhf.recipe import Pick, Recipe, RoleRecipe, from_mapping
from rlhf.registry import Registry

WITHOUT_BF16 = Gpu("T4", 16 << 30, (7, 5))

# What nobody named


def test_where_nothing_is_named_the_highest_rank_among_the_legal_is_taken(plan: Planned, machine: Machine) -> None:
    made = plan(*ONLINE_WORDS)
    names = (made.algo.name, made.policy.name, made.optim.name, made.backend.name, made.launch.name)
    assert names == ("fake-online", "fake-policy", "fake-optim", "fake-one", "fake-launch")
    assert made.engine is not None
    assert made.engine.name == "fake-engine"
    assert [component.name for component in made.trackers] == ["fake-track"]  # rank 0 is never taken unasked
    assert mem(made, "policy") == ["fake-half"]
    plain = attrs.evolve(machine, gpus=(WITHOUT_BF16,))
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
    plain = attrs.evolve(machine, gpus=(WITHOUT_BF16,))
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
    plain = attrs.evolve(machine, gpus=(WITHOUT_BF16,))
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


def test_what_a_component_settles_itself_is_noted(make_registry: Callable[..., Registry], plan: Planned) -> None:
    """After what the core settled; of one whose note fails, that it did: the plan is no worse for it."""

    def tells(plan: Plan, component: Component) -> Iterable[str]:
        yield f"--mem {component.name}: {len(plan.roles)} role"

    def fails(plan: Plan, component: Component) -> Iterable[str]:
        raise KeyError("heads")

    noting = MemoryEntry(name="fake-noting", phase="wrap", notes=(tells, fails), **IMPL)
    found = plan("--algo", "fake-alone", "--mem", "fake-noting", among=make_registry(*BASE, noting))
    assert found.notes[-2:] == (
        "--mem fake-noting: 1 role",
        "--mem fake-noting (from fake-package 1.0): its note failed: KeyError: 'heads'",
    )
    assert len(found.notes) > 2


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


# What plugins do wrong while a plan is made


def fails(config: Any) -> Any:
    raise ZeroDivisionError("of a plugin")


@pytest.mark.parametrize("roles", [fails, lambda config: None, lambda config: ("policy",)])
def test_roles_that_cannot_be_told_are_a_problem_of_the_plugin(
    make_registry: Callable[..., Registry], plan: Planned, roles: Any
) -> None:
    registry = make_registry(*BASE, attrs.evolve(PAIRS, name="fake-broken", roles=roles))
    error = problems(lambda: plan("--algo", "fake-broken", among=registry))
    assert told(error)[0].startswith("--algo fake-broken (from fake-package 1.0): its roles can't be told: ")
    assert error.problems[0].fix == "leave it out, and tell its author"
    assert plan("--algo", "fake-pairs", among=registry)  # it harms nobody else


# What is installed


def test_any_mix_of_what_is_installed_is_a_plan_or_a_request_error(
    installed: Registry, tiny_model: Path, machine: Machine
) -> None:
    draw = random.Random(0)

    def names(kind: str) -> list[str]:
        return [offer.name for offer in installed.offers_of(kind)]

    values: list[Any] = ["0", "-1", "0.5", "8", "true", "none", "x", "1e9", None, [], {}]
    accepted, slowest = 0, 0.0
    for _ in range(300):
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
        start = time.process_time()  # of this process: others may want the cores
        try:
            made = compose(recipe, installed, machine)
        except RequestError as error:
            assert error.problems
            assert all(problem.what for problem in error.problems)
        else:
            accepted += 1
            again = compose(from_mapping(made.to_recipe(), "again.yaml"), installed, machine)
            assert again.to_recipe() == made.to_recipe()
        slowest = max(slowest, time.process_time() - start)
    assert accepted > 20
    # A refused mix tries up to 400 others at well under a millisecond each; the rest is for a slow machine.
    assert slowest < 1.0
