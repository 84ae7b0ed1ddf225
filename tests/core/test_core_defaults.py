"""Defaults that depend on the combination: the user's go before, then a strategy's multiple of the algorithm's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner

from needs import ADAMW8BIT
from rlhf.cli.run import run
from rlhf.compose import compose
from rlhf.entries import Times
from rlhf.facts import Machine
from rlhf.plan import Plan
from rlhf.recipe import Recipe, from_mapping
from rlhf.registry import Registry


@pytest.fixture
def plan(typed: Callable[..., Recipe], installed: Registry, machine: Machine) -> Callable[..., Plan]:
    return lambda *words: compose(typed(*words), installed, machine)


def rate(plan: Plan) -> float:
    found: float = plan.optim.config.learning_rate
    return found


def notes(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "learning-rate" in note]


def test_ten_times_a_millionth_is_what_people_write() -> None:
    assert Times(10.0, "").of(1e-6) == 1e-5 and Times(10.0, "").of(3e-6) == 3e-5
    assert 10 * 1e-6 != 1e-5  # as numbers are


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--algo", "dpo"), 1e-6),
        (("--algo", "dpo", "--mem", "lora"), 1e-5),
        (("--algo", "ppo", "--mem", "lora"), 3e-5),
        (("--algo", "sft", "--mem", "lora,checkpointing"), 2e-4),
        (("--algo", "reward", "--mem", "lora"), 1e-4),
        (("--algo", "dpo", "--mem", "policy=lora"), 1e-5),  # its only trained role
        (("--algo", "ppo", "--mem", "policy=lora"), 3e-6),  # the value model is trained whole
        (("--algo", "ppo", "--mem", "lora", "--mem", "value=checkpointing"), 3e-6),
        (("--algo", "ppo", "--mem", "policy=lora", "--mem", "value=lora"), 3e-5),
        (("--algo", "ppo", "--mem", "policy=lora", "--algo.value-model", "shared"), 3e-5),  # a head on its trunk
        pytest.param(("--algo", "dpo", "--mem", "lora", "--optim", "adamw8bit"), 1e-5, marks=ADAMW8BIT),
        (("--algo", "dpo", "--mem", "lora", "--optim.learning-rate", "7e-7"), 7e-7),  # the user's goes before
    ],
)
@pytest.mark.whole
def test_adapters_learn_at_ten_times_the_rate(
    plan: Callable[..., Plan], tiny_model: object, words: tuple[str, ...], expected: float
) -> None:
    reward = ("--reward", "length") if words[1] == "ppo" else ()
    made = plan(*words, *reward, "--model", str(tiny_model))
    assert rate(made) == expected
    told = expected in (1e-5, 3e-5, 2e-4, 1e-4)
    assert len(notes(made)) == told
    if told:
        usual = f"10 times the usual {expected / 10:g}, for --mem lora (LoRA Without Regret, Schulman et al. 2025)"
        assert notes(made) == [f"--optim.learning-rate {expected}: {usual}"]


def test_the_recipe_as_resolved_keeps_it(plan: Callable[..., Plan], installed: Registry, machine: Machine) -> None:
    made = plan("--algo", "dpo", "--mem", "lora")
    again = compose(from_mapping(made.to_recipe(), "recipe.yaml"), installed, machine)
    assert rate(again) == rate(made) and notes(again) == []


def test_help_shows_what_would_stand_and_who_set_it() -> None:
    own = "set by the starter 'judged sums'"
    for mem, expected in ((), "0.0001, " + own), (("--mem", "lora"), "0.001, set by lora: 10 times the 0.0001 of"):
        text = " ".join(CliRunner().invoke(run, ["--algo", "dpo", *mem, "--help"]).output.split())
        assert f"[default: {expected}" in text


def test_a_note_says_what_was_multiplied_and_whose_it_was(plan: Callable[..., Plan]) -> None:
    made = plan("--algo", "dpo", "--mem", "lora")  # with the starter's model
    assert rate(made) == 1e-3
    (note,) = notes(made)
    assert note.startswith("--optim.learning-rate 0.001: 10 times the 0.0001 of the starter ")
    assert note.endswith(", for --mem lora (LoRA Without Regret, Schulman et al. 2025)")
