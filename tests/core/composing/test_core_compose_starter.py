"""What a run takes where the user names no model or no data, the formats of data, and what help says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_components import (
    BASE,
    IMPL,
    ONLINE,
    Planned,
    Typed,
    mem,
    problems,
    told,
)

from rlhf.compose import chosen_by, compose
from rlhf.entries import (
    FormatEntry,
    RewardEntry,
    StarterEntry,
)
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.plan import Plan
from rlhf.recipe import Recipe
from rlhf.registry import Registry
from rlhf.rows import PromptRow

# Data and the starter


def test_formats_are_found_by_file_name_folders_and_hub_ids_too(plan: Planned, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "folder").mkdir()
    words = [word for path in (str(tmp_path / "a.csv"), str(tmp_path / "folder"), "org/Set-3.1-Pro") for word in
             ("--data", path)]  # fmt: skip
    made = plan("--algo", "fake-pairs", *words)
    assert [source.format.name for source in made.data] == ["fake-table", "fake-hub", "fake-hub"]
    named = plan("--algo", "fake-pairs", "--format", "fake-lines", *words[:4])
    assert [source.format.name for source in named.data] == ["fake-lines"] * 2
    error = problems(lambda: plan("--algo", "fake-pairs", "--format", "fake-lines", *words))
    assert told(error) == ["--data org/Set-3.1-Pro: there is no such file here, and --format fake-lines reads files"]
    own = plan("--algo", "fake-pairs", "--format", "fake-store", "--data", "store://any thing")
    assert own.data[0].path == "store://any thing"


@pytest.mark.parametrize("path", ["no.jsonl", "./no", "a/b/c", "/no/where", "org/no.csv", "no.txt", "s3://a/b", "~/no"])
def test_data_that_is_not_there(plan: Planned, path: str) -> None:
    error = problems(lambda: plan("--algo", "fake-pairs", "--data", path))
    assert told(error) == [f"--data {path}: there is no such file here"]
    error = problems(lambda: plan("--algo", "fake-pairs", "--eval-data", path))
    assert told(error) == [f"--eval-data {path}: there is no such file here"]


def test_data_with_a_hub_id_that_the_hub_does_not_have(plan: Planned, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pairs").mkdir()
    error = problems(lambda: plan("--algo", "fake-pairs", "--data", "runs/pair"))
    what = "--data runs/pair: there is no such file here, and the fake hub has no such thing"
    assert told(error) == [what]
    assert error.problems[0].fix.startswith("did you mean runs/pairs? give a file or folder that exists")


def test_data_that_no_format_claims(plan: Planned, tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("")
    error = problems(lambda: plan("--algo", "fake-pairs", "--data", str(tmp_path / "a.xyz")))
    assert "no format claims it" in told(error)[0]
    assert "fake-table (.csv)" in error.problems[0].fix


def test_data_that_two_formats_claim_alike_is_nobodys_until_one_is_named(
    make_registry: Callable[..., Registry], plan: Planned, tmp_path: Path
) -> None:
    other = FormatEntry(name="fake-other", suffixes=(".csv", ".more.jsonl"), **IMPL)
    among = make_registry(*BASE, other)
    for name in ("a.csv", "b.more.jsonl"):
        (tmp_path / name).write_text("")
    data = ("--algo", "fake-pairs", "--data", str(tmp_path / "a.csv"))
    error = problems(lambda: plan(*data, among=among))
    assert told(error) == [f"--data {tmp_path / 'a.csv'}: fake-other and fake-table both claim it"]
    assert error.problems[0].fix == "--format fake-other or --format fake-table"
    assert plan(*data, "--format", "fake-table", among=among).data[0].format.name == "fake-table"
    longer = plan("--algo", "fake-pairs", "--data", str(tmp_path / "b.more.jsonl"), among=among)
    assert longer.data[0].format.name == "fake-other"  # it claims more of the name than fake-lines


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


def test_where_the_starter_beats_the_algorithm_it_is_noted(
    make_registry: Callable[..., Registry], started: Planned, machine: Machine, typed: Typed
) -> None:
    algo = attrs.evolve(ONLINE, defaults={"batch_size": 7, "engine.temperature": 0.5, "seed": 1})
    reward = RewardEntry(name="fake-plain", **IMPL)
    registry = make_registry(*(algo if entry is ONLINE else entry for entry in BASE), reward, starters=(STARTER,))
    beaten = [note for note in compose(typed(), registry, machine).notes if "alone would set" in note]
    assert beaten == [  # of the seed both say the same
        "--batch-size 2: set by the starter 'fake-start'; fake-online alone would set 7",
        "--engine.temperature 0.25: set by the starter 'fake-start'; fake-online alone would set 0.5",
    ]
    said = compose(typed("--batch-size", "3", "--engine.temperature", "1"), registry, machine)
    assert not any("alone would set" in note for note in said.notes)


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
    words = ("--reward", "fake-reward:mine", "--mem", "value=fake-adapter", "--format", "fake-lines")
    found = chosen_by(typed(*words), registry).entries
    assert set(found["reward"]) == {"mine"}  # what its options are addressed by
    assert set(found["mem"]) == {"fake-adapter", "fake-half"}
    assert set(found["format"]) == {"fake-lines"}
    assert set(found["algo"]) == {"fake-online"}
    with pytest.raises(RequestError, match="there is no --engine 'x'"):
        chosen_by(typed("--engine", "x"), registry)


def test_what_holds_where_nothing_is_said_and_who_set_it(make_registry: Callable[..., Registry], typed: Typed) -> None:
    algo = attrs.evolve(ONLINE, defaults={"batch_size": 7, "seed": 9})
    registry = make_registry(
        *(algo if entry is ONLINE else entry for entry in BASE), RewardEntry(name="fake-plain", **IMPL),
        starters=(STARTER,),
    )  # fmt: skip
    chosen = chosen_by(typed("--algo", algo.name), registry)
    assert (chosen.settings["batch_size"], chosen.setters["batch_size"]) == (2, "the starter 'fake-start'")
    chosen = chosen_by(typed("--algo", algo.name, "--model", "org/base"), registry)
    assert (chosen.settings["batch_size"], chosen.setters["batch_size"]) == (7, algo.name)
    assert "max_steps" not in chosen.setters
