"""What the policy refuses of a model by its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.compose import compose
from rlhf.errors import RequestError
from rlhf.facts import Machine
from rlhf.recipe import Recipe
from rlhf.registry import Registry


@pytest.mark.parametrize(
    ("algo", "model", "refused"),
    [
        ("dpo", {"config.json": {"architectures": ["LlamaForSequenceClassification"]}}, True),
        ("dpo", {"adapter_config.json": {"task_type": "SEQ_CLS"}}, True),
        ("dpo", {"adapter_config.json": {"task_type": "CAUSAL_LM"}}, False),
        ("dpo", {"adapter_config.json": {}}, False),
        ("reward", {"config.json": {"architectures": ["LlamaForSequenceClassification"]}}, False),
    ],
)
def test_a_reward_model_is_no_policy(
    algo: str, model: dict[str, Any], refused: bool, tmp_path: Path, tiny_model: Path,
    typed: Callable[..., Recipe], installed: Registry, machine: Machine,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    (own,) = model
    content = json.loads((tiny_model / "config.json").read_text()) if own == "config.json" else {}
    base = {"base_model_name_or_path": str(tiny_model)} if own != "config.json" else {}
    (folder / own).write_text(json.dumps({**content, **base, **model[own]}))
    recipe = typed("--algo", algo, "--model", str(folder))
    if not refused:
        compose(recipe, installed, machine)
        return
    with pytest.raises(RequestError) as caught:
        compose(recipe, installed, machine)
    said = str(caught.value)
    assert said.count("is a classifier") == 1 and "--model reward=PATH" in said  # of policy and reference: once


@pytest.mark.parametrize(
    ("more", "noted"),
    [((), True), (("--policy.chat", "true"), False), (("--policy.template", "Q: {prompt}"), False)],
    ids=str,
)
def test_a_chat_model_that_is_given_plain_text_is_noted(
    more: tuple[str, ...], noted: bool, tiny_model: Path,
    typed: Callable[..., Recipe], installed: Registry, machine: Machine,
) -> None:  # fmt: skip
    def told(*words: str) -> bool:
        plan = compose(typed("--algo", "ppo", *words), installed, machine)
        return any("stay so; --policy.chat true" in note for note in plan.notes)

    assert told("--model", str(tiny_model), *more) == noted
    assert not told(*more)  # the built-in model was made so
    (tiny_model / "chat_template.jinja").rename(tiny_model / "away")
    try:
        assert not told("--model", str(tiny_model), *more)
    finally:
        (tiny_model / "away").rename(tiny_model / "chat_template.jinja")


def test_a_longest_prompt_leaves_room_to_answer(
    typed: Callable[..., Recipe], installed: Registry, machine: Machine
) -> None:
    compose(typed("--algo", "ppo", "--policy.max-prompt-tokens", "511"), installed, machine)
    with pytest.raises(RequestError, match="context is 512 tokens"):
        compose(typed("--algo", "ppo", "--policy.max-prompt-tokens", "512"), installed, machine)
