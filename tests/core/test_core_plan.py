"""Plans: the resolved recipe makes the same plan again, and plan.json holds all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import yaml

from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Gpu, Machine
from rlhf.plan import Plan, component_from_json, plan_from_json, resource
from rlhf.recipe import Recipe, from_mapping
from rlhf.registry import Registry

Typed = Callable[..., Recipe]

MIXES: dict[str, tuple[str, ...]] = {
    "the starter": ("--algo", "ppo"),
    "options everywhere": (
        "--algo", "ppo", "--algo.value-clip-range", "none", "--algo.target-kl", "0.1", "--engine.stop", "END,STOP",
        "--optim.max-norm", "none", "--policy.chat", "--track.console.samples", "0", "--max-steps", "3",
    ),
    "a reference that is the policy with its adapters off": ("--algo", "dpo", "--mem", "lora"),
    "the same with a module of its own": ("--algo", "dpo", "--mem", "lora", "--mem", "reference=fp32"),
    "the same, because its model was named": ("--algo", "dpo", "--mem", "lora", "--model", "MODEL", "--model",
                                               "reference=MODEL"),
    "a value head on the policy's trunk": ("--algo", "ppo", "--algo.value-model", "shared", "--mem", "lora"),
    "no reference": ("--algo", "ppo", "--algo.kl-coef", "0"),
    "labelled rewards": (
        "--algo", "ppo", "--reward", "model:helpful", "--reward", "model:safe", "--reward.safe.weight", "-0.5",
        "--reward", "length", "--model", "helpful=RM", "--model", "safe=RM", "--model", "MODEL",
    ),
    "memory by role": (
        "--algo", "ppo", "--mem", "fp32", "--mem", "policy=bf16,lora,checkpointing", "--mem", "value=bf16,lora:small",
        "--mem.small.rank", "4", "--mem.lora.rank", "32",
    ),
    "an earlier run with a value of its own": ("--algo", "ppo", "--model", "RUN"),
    "that value too": ("--algo", "ppo", "--model", "RUN", "--model", "value=RUN"),
    "a hub model and data": ("--algo", "sft", "--model", "org/name", "--data", "org/set", "--format.split", "train"),
    "data of two formats": ("--algo", "sft", "--data", "A.jsonl", "--data", "B.csv", "--format.limit", "5"),
    "held-out data of another format": ("--algo", "sft", "--data", "A.jsonl", "--eval-data", "B.csv"),
    "a column map": ("--algo", "sft", "--data", "A.jsonl", "--format.columns", "prompt=question"),
}  # fmt: skip


@pytest.fixture(params=MIXES)
def mix(
    request: pytest.FixtureRequest, typed: Typed, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Recipe:
    """One of the mixes, its names in capitals made real."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((tiny_model / "config.json").read_text())
    judge = {**config, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    for place, content in (("MODEL", config), ("RM", judge), ("RUN/model", config), ("RUN/model/value", judge)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text(json.dumps(content))
    for name in ("A.jsonl", "B.csv"):
        (tmp_path / name).write_text("")
    return typed(*MIXES[request.param])


@pytest.mark.whole
def test_the_resolved_recipe_makes_the_same_plan(mix: Recipe, installed: Registry, machine: Machine) -> None:
    plan = compose(mix, installed, machine)
    text = yaml.safe_dump(plan.to_recipe(), sort_keys=False)
    again = compose(from_mapping(yaml.safe_load(text), "again.yaml"), installed, machine)
    # All but the notes, which tell who chose: this time everything was named.
    assert attrs.evolve(again, notes=()) == attrs.evolve(plan, notes=())
    assert yaml.safe_dump(again.to_recipe(), sort_keys=False) == text


@pytest.mark.whole
def test_plan_json_makes_the_same_plan(mix: Recipe, installed: Registry, machine: Machine) -> None:
    plan = compose(mix, installed, attrs.evolve(machine, gpus=(Gpu("A", 80 << 30, (8, 0)),)))
    text = json.dumps(plan.to_json(), allow_nan=False)
    assert plan_from_json(json.loads(text), installed) == plan


def test_the_mixes_are_what_they_say(typed: Typed, installed: Registry, machine: Machine) -> None:
    """The round trips above would pass on plans without a shared module too."""

    def views(name: str) -> dict[str, str]:
        plan = compose(typed(*MIXES[name]), installed, machine)
        return {role.name: role.view for role in plan.roles}

    assert views("a reference that is the policy with its adapters off")["reference"] == "adapters-off"
    assert views("the same with a module of its own")["reference"] == "own"
    shared = {"policy": "own", "reference": "adapters-off", "value": "trunk"}
    assert views("a value head on the policy's trunk") == shared


@pytest.fixture
def plan(typed: Typed, installed: Registry, machine: Machine) -> Plan:
    return compose(typed("--algo", "ppo", "--mem", "lora"), installed, machine)


def test_the_resolved_recipe_writes_every_option_out(plan: Plan) -> None:
    recipe = plan.to_recipe()
    assert recipe["algo"]["clip_range"] == 0.2
    assert recipe["seed"] == 0
    assert [part["name"] for part in recipe["mem"]] == ["fp32", "lora"]
    assert all(Path(path).is_absolute() for path in (*recipe["data"], *recipe["eval_data"]))


def test_a_component_is_built_from_its_part_of_plan_json_alone(plan: Plan, installed: Registry) -> None:
    lora = plan.mem[-1]
    assert component_from_json(json.loads(json.dumps(lora.to_json())), installed) == lora


def test_a_plan_of_another_version_or_of_what_is_not_here_is_refused(plan: Plan, installed: Registry) -> None:
    with pytest.raises(RequestError, match="API version 99"):
        plan_from_json({**plan.to_json(), "api_version": 99}, installed)
    gone: dict[str, Any] = {**plan.algo.to_json(), "name": "gone"}
    with pytest.raises(RequestError, match="there is no --algo 'gone'"):
        plan_from_json({**plan.to_json(), "algo": gone}, installed)
    changed = {**plan.algo.to_json(), "options": {"no_longer": 1}}
    with pytest.raises(RequestError, match=r"unknown option --algo\.no-longer"):
        plan_from_json({**plan.to_json(), "algo": changed}, installed)


def test_the_plan_answers_by_role(plan: Plan) -> None:
    assert plan.role("value").role.head == "scalar"
    assert plan.online
    assert plan.objective == ("reward/mean", "max")
    assert {"rollouts", "adapters", "bf16"} <= plan.provides()
    with pytest.raises(KeyError, match="it has policy, reference, value"):
        plan.role("teacher")


def test_resources(tmp_path: Path) -> None:
    assert Path(resource("rlhf_plugins.starter:model")).is_dir()
    for text in ("org/name", "org/name:config:train", "no_such_package_here:x", "plain", ":x", "./a:b"):
        assert resource(text) == text
