"""Recipes: what is typed and what YAML says mean the same, and nothing said is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import RequestError
from rlhf.recipe import Pick, Recipe, RoleRecipe, from_file, from_mapping

Typed = Callable[..., Recipe]


def refused(content: dict[str, Any]) -> list[str]:
    with pytest.raises(RequestError) as caught:
        from_mapping(content, "my.yaml")
    return [str(problem) for problem in caught.value.problems]


# Flags


@pytest.mark.parametrize(
    "words",
    [
        ("--algo.clip-range", "0.1"),
        ("--algo.clip_range", "0.1"),
        ("--algo.clip-range=0.1",),
        ("--algo.clip_range=0.1",),
    ],
)
def test_options_take_dashes_or_underscores_a_space_or_an_equals_sign(typed: Typed, words: tuple[str, ...]) -> None:
    assert typed("--algo", "ppo", *words).options == {"algo": {"clip_range": "0.1"}}


def test_values_may_be_negative_hold_equals_signs_or_be_left_out(typed: Typed) -> None:
    recipe = typed(
        "--reward.python.weight", "-0.5", "--format.columns=prompt=question,answer=solution", "--algo.whiten-rewards"
    )
    assert recipe.options == {
        "reward.python": {"weight": "-0.5"},
        "format": {"columns": "prompt=question,answer=solution"},
        "algo": {"whiten_rewards": True},  # not the text "true", which a text option would take
    }


def test_kinds_of_many_need_the_components_name(typed: Typed) -> None:
    recipe = typed("--mem.lora.rank", "16", "--reward.helpful.weight=2", "--mem.my.own-way.x_y", "1")
    assert recipe.options == {
        "mem.lora": {"rank": "16"},
        "reward.helpful": {"weight": "2"},
        "mem.my.own-way": {"x_y": "1"},  # a component's name may hold dots and dashes
    }
    with pytest.raises(RequestError) as caught:
        typed("--mem.rank", "16", "--algo.ppo.clip-range", "0.1")
    assert [problem.fix for problem in caught.value.problems] == [
        "options of this kind read --mem.COMPONENT.FIELD",
        "options of this kind read --algo.FIELD",
    ]


def test_an_option_of_no_kind_names_the_nearest(typed: Typed) -> None:
    with pytest.raises(RequestError) as caught:
        typed("--alog.clip-range", "0.1")
    assert caught.value.problems[0].fix == "did you mean --algo.clip-range?"


def test_memory_repeated_or_joined_is_the_same(typed: Typed) -> None:
    apart, joined = typed("--mem", "lora", "--mem", "4bit"), typed("--mem", "lora,4bit")
    assert apart == joined
    assert joined.picks == {"mem": (Pick("lora"), Pick("4bit"))}


def test_a_value_for_one_role(typed: Typed) -> None:
    recipe = typed("--mem", "lora", "--mem", "reward=4bit,fp32", "--model", "base", "--model", "reward=runs/a=b/rm")
    assert recipe.picks["mem"] == (Pick("lora"),)
    assert recipe.model == "base"
    assert recipe.roles == {"reward": RoleRecipe("runs/a=b/rm", (Pick("4bit"), Pick("fp32")))}


def test_a_folder_with_an_equals_sign_in_its_name_is_a_model(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    assert typed("--model", "lr=3").model == "lr=3"
    assert typed("--model", "lr=4").roles == {"lr": RoleRecipe("4")}


def test_labels_tell_two_of_a_sort_apart(typed: Typed) -> None:
    recipe = typed("--reward", "model:helpful", "--reward", "model:2", "--model", "2=PATH")
    assert [pick.key for pick in recipe.picks["reward"]] == ["helpful", "2"]
    assert recipe.roles == {"2": RoleRecipe("PATH")}


def test_no_tracker_at_all_is_said_by_none(typed: Typed, tmp_path: Path) -> None:
    silent = Recipe(picks={"track": ()})
    assert (
        typed("--track", "none") == from_mapping({"track": "none"}, "r") == from_mapping({"track": []}, "r") == silent
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text("track: {name: console, samples: 2}")
    assert typed(str(recipe), "--track", "none") == silent
    recipe.write_text("track: []")
    assert typed(str(recipe)) == silent
    assert typed(str(recipe), "--track", "console").picks == {"track": (Pick("console"),)}
    assert refused({"track": ["none", "console"]})[0].startswith("my.yaml: track: none stands alone")
    # of the other kinds it is a name like any other, and nobody's
    assert typed("--mem", "none").picks == {"mem": (Pick("none"),)}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--track", "none,console"), "--track none stands alone"),
        (("--model", "a", "--model", "b"), "--model is given twice: a, b"),
        (("--algo", "ppo", "--algo", "dpo"), "--algo takes one component, not 2"),
        (("--mem", "lora,reward=4bit"), "--mem lora,reward=4bit can't be read"),
    ],
)
def test_what_would_silently_lose_a_part_is_refused(typed: Typed, words: tuple[str, ...], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        typed(*words)


def test_run_options(typed: Typed) -> None:
    recipe = typed("--max-steps", "5", "--batch-size=8", "--seed", "1", "--save-every", "2", "--keep", "3")
    assert recipe.run == {"max_steps": "5", "batch_size": "8", "seed": "1", "save_every": "2", "keep": "3"}


# YAML


def test_yaml_says_what_flags_say(typed: Typed) -> None:
    content = {
        "algo": {"name": "ppo", "clip_range": 0.1},
        "mem": ["lora", "fp32"],
        "reward": [{"name": "model", "label": "helpful", "weight": 2}],
        "roles": {"reward": {"model": "rm", "mem": ["fp32"]}},
        "model": "base",
        "data": "prompts.jsonl",
        "eval-data": ["a.jsonl", "b.jsonl"],
        "batch-size": 8,
    }
    recipe = from_mapping(content, "my.yaml")
    assert recipe.picks == {
        "algo": (Pick("ppo", "", {"clip_range": 0.1}),),
        "mem": (Pick("lora"), Pick("fp32")),
        "reward": (Pick("model", "helpful", {"weight": 2}),),
    }
    assert recipe.roles == {"reward": RoleRecipe("rm", (Pick("fp32"),))}
    assert (recipe.model, recipe.data, recipe.eval_data) == ("base", ("prompts.jsonl",), ("a.jsonl", "b.jsonl"))
    assert recipe.run == {"batch_size": 8}
    assert from_mapping({"mem": "lora, fp32"}, "my.yaml").picks == typed("--mem", "lora,fp32").picks


def test_options_without_a_name_are_for_whichever_component_is_chosen() -> None:
    recipe = from_mapping({"engine": {"max-new-tokens": 8}}, "my.yaml")
    assert recipe.options == {"engine": {"max_new_tokens": 8}}
    assert recipe.picks == {}


def test_an_unknown_key_names_the_nearest() -> None:
    assert refused({"alog": "ppo"}) == ["my.yaml: unknown key 'alog'\n    did you mean 'algo'?"]
    assert "did you mean 'batch_size'?" in refused({"batchsize": 8})[0]


def test_every_wrong_key_and_shape_is_told_at_once() -> None:
    told = refused(
        {
            "zzzzzz": 1,
            "algo": ["ppo", "dpo"],
            "mem": [3],
            "model": 7,
            "data": [1],
            "roles": {"reward": {"modle": "x"}, "value": "x"},
        }
    )
    assert len(told) == 7
    for part in ("zzzzzz", "algo takes one", "mem: 3", "model must be text", "data must be", "modle", "value"):
        assert any(part in what for what in told), part


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"batch_size": 4, "batch-size": 8}, "my.yaml: batch_size and batch-size are one key, given twice"),
        ({"eval_data": "a", "eval-data": "b"}, "my.yaml: eval_data and eval-data are one key"),
        ({"policy": {"max-length": 3, "max_length": 9}}, "my.yaml: policy: max-length and max_length are one key"),
        ({"algo": {"name": "ppo", "clip-range": 1, "clip_range": 2}}, "my.yaml: algo: ppo: clip-range and clip_range"),
        ({"mem": [{"name": "lora", "x-y": 1, "x_y": 2}]}, "my.yaml: mem: lora: x-y and x_y are one key"),
    ],
)
def test_a_key_in_both_spellings_is_refused(content: dict[str, Any], what: str) -> None:
    (told,) = refused(content)
    assert told.startswith(what) and "leave all but one out" in told


def test_dashes_of_a_components_own_options_are_underscores() -> None:
    assert from_mapping({"algo": {"name": "ppo", "clip-range": 1}}, "r").picks["algo"][0].options == {"clip_range": 1}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"algo": ""}, "my.yaml: algo is given nothing\n    algo: NAME, or leave it out"),
        ({"algo": []}, "my.yaml: algo is given nothing"),
        ({"reward": []}, "my.yaml: reward is given nothing"),
        ({"mem": ",, "}, "my.yaml: mem is given nothing"),
        ({"mem": ["lora", ""]}, "my.yaml: mem is given nothing"),
        ({"model": ""}, "my.yaml: model is given nothing\n    model: PATH, or leave it out"),
        ({"model": " "}, "my.yaml: model is given nothing"),
        ({"data": ""}, "my.yaml: data is given nothing\n    data: PATH, or leave it out"),
        ({"data": []}, "my.yaml: data is given nothing"),
        ({"data": ["a.jsonl", ""]}, "my.yaml: data is given nothing"),
        ({"eval-data": ""}, "my.yaml: eval_data is given nothing"),
        ({"ptx_data": [""]}, "my.yaml: ptx_data is given nothing"),
        ({"roles": 0}, "my.yaml: roles must map a role to its choices"),
        ({"roles": []}, "my.yaml: roles must map a role to its choices"),
        ({"roles": {"reward": {"model": ""}}}, "my.yaml: roles: reward: model is given nothing"),
        ({"reward": {"name": "model", "label": None}}, "my.yaml: reward: model: the label None is no word"),
        ({"reward": {"name": "model", "label": ""}}, "my.yaml: reward: model: the label '' is no word"),
        ({"reward": {"name": "model", "label": True}}, "my.yaml: reward: model: the label True is no word"),
    ],
)
def test_what_is_given_nothing_does_not_mean_what_leaving_it_out_does(content: dict[str, Any], what: str) -> None:
    (told,) = refused(content)
    assert told.startswith(what)


def test_none_at_all_is_said_by_an_empty_list_where_that_is_a_choice() -> None:
    """As a run's own recipe.yaml has it."""
    content = {"mem": [], "track": [], "eval_data": [], "ptx_data": [], "roles": {"value": {"mem": []}}, "model": None}
    recipe = from_mapping(content, "r")
    assert recipe.picks == {"mem": (), "track": ()}
    assert (recipe.eval_data, recipe.ptx_data, recipe.model) == ((), (), None)
    assert recipe.roles == {"value": RoleRecipe(None, ())}
    assert from_mapping({"reward": {"name": "model", "label": 2}}, "r").picks["reward"][0].label == "2"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "there is no such recipe file"),
        ("algo: [ppo", "is no YAML"),
        ("a: b\nseed: 2020-13-45", "is no YAML: line 2: '2020-13-45' is no timestamp"),
        ("seed: !!int foo", "is no YAML: line 1: 'foo' is no int"),
        ("seed: !!float foo", "is no YAML: line 1: 'foo' is no float"),
        ("seed: !!int", "is no YAML: line 1: '' is no int"),
        ("seed: " + "9" * 5000, "is no YAML: line 1: '9+ is no int"),
        ("algo: " + "[" * 3000, "is no YAML: it is nested too deeply"),
        ("stages: &s {a: *s}", "is no YAML: found unconstructable recursive node"),
        ("- ppo", "holds no recipe"),
        ("", "holds no recipe"),
        (b"algo: \xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: Any, what: str) -> None:
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match=what):
        from_file(path)


def test_no_options_are_none(tmp_path: Path) -> None:
    assert from_mapping({"algo": "sft", "engine": {}}, "r") == from_mapping({"algo": "sft"}, "r")


def test_a_role_takes_no_number_for_a_key() -> None:
    assert refused({"roles": {"policy": {1: "x", "y": 2}}})[0].startswith("my.yaml: roles: policy: 1, y is unknown")


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("algo: !!python/object/apply:os.getcwd []")
    with pytest.raises(RequestError, match="is no YAML"):
        from_file(path)


# Flags over YAML


def test_flags_go_over_yaml_and_the_rest_stays(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        """
        algo: {name: ppo, clip_range: 0.1, gamma: 0.9}
        mem: [{name: lora, rank: 4}, fp32]
        roles: {reward: {model: rm, mem: [{name: lora, rank: 2}]}}
        model: base
        data: a.jsonl
        batch_size: 8
        seed: 3
        """
    )
    recipe = typed(
        str(path), "--algo.gamma", "1", "--seed", "4", "--model", "other", "--data", "b.jsonl", "--mem", "value=fp32"
    )
    assert recipe.picks["algo"] == (Pick("ppo", "", {"clip_range": 0.1, "gamma": 0.9}),)
    assert recipe.options == {"algo": {"gamma": "1"}}  # lies over the pick's own, see test_core_compose
    assert recipe.run == {"batch_size": 8, "seed": "4"}
    assert (recipe.model, recipe.data) == ("other", ("b.jsonl",))
    assert recipe.roles["reward"] == RoleRecipe("rm", (Pick("lora", "", {"rank": 2}),))
    assert recipe.roles["value"] == RoleRecipe(None, (Pick("fp32"),))


def test_naming_a_component_again_keeps_its_options_another_one_drops_them(typed: Typed, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("algo: {name: ppo, clip_range: 0.1}\nmem: [{name: lora, rank: 4}, fp32]")
    again = typed(str(path), "--algo", "ppo", "--mem", "lora")
    assert again.picks == {"algo": (Pick("ppo", "", {"clip_range": 0.1}),), "mem": (Pick("lora", "", {"rank": 4}),)}
    assert typed(str(path), "--algo", "dpo").picks["algo"] == (Pick("dpo"),)


def test_a_key_given_twice_is_an_error_not_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("algo: ppo\nseed: 1\nalgo: dpo\n")
    with pytest.raises(RequestError, match="line 3 gives the key 'algo' again"):
        from_file(path)
    path.write_text("algo: {name: ppo, gamma: 1, gamma: 0.9}\n")
    with pytest.raises(RequestError, match="line 1 gives the key 'gamma' again"):
        from_file(path)


def test_a_pipeline_given_as_a_recipe_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text("stages: {sft: {algo: sft}}\n")
    with pytest.raises(RequestError, match=r"is a pipeline[\s\S]*rlhf pipeline .*stages.yaml"):
        from_file(path)
