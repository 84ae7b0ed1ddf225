"""Two real steps of each chosen combination on a tiny model, its numbers beside those of the plain stack in float32.

The first step's loss is of weights that nothing has trained yet, so every stack has the plain one's, to what its
precision rounds away. Where a stack changes neither the optimiser nor what is trained, so is the second's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from cover import OPTIONS, Combination, choose, classes, covered, first_of_each, legal, lends, line, parse, read
from judging import rows
from safetensors.torch import load_file, save_file

from rlhf import facts
from rlhf.entries import AlgorithmEntry, RewardEntry
from rlhf.options import fields
from rlhf.registry import Registry, loaded
from warm import Ranks, metrics

CHOSEN = read()
FEW = set(first_of_each(CHOSEN))
QUANTISED = {"4bit", "8bit"}
CASES = [pytest.param(c, id=c.name, marks=pytest.mark.matrix if c in FEW else pytest.mark.matrix_full) for c in CHOSEN]


@pytest.fixture(scope="session")
def teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model unlike the one that is trained, for roles that must be given one."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    shutil.copytree(tiny_model, folder)
    (weights,) = folder.glob("*.safetensors")
    torch.manual_seed(0)
    tensors = {name: tensor * (1 + 0.1 * torch.randn(tensor.shape)) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


Recipes = Callable[[Combination, bool], dict[str, Any]]
"""The recipe of a combination; its judge, where it asks one, is adapters on the policy's base or a whole model."""


@pytest.fixture(scope="session")
def judge(one: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A reward model by the role that asks for it, whole or adapters on the policy's base, each made once: by a step of
    the algorithm that has its name."""
    made: dict[tuple[str, bool], Path] = {}

    def make(role: str, adapters: bool) -> Path:
        if (role, adapters) not in made:
            folder = made[role, adapters] = tmp_path_factory.mktemp("judges") / role
            mem = ["fp32", "lora"] if adapters else ["fp32"]
            one({"algo": role, "mem": mem, "max_steps": 1, "eval_rows": 0, "track": "none"}, folder)
        return made[role, adapters] / "model"

    return make


@pytest.fixture(scope="session")
def recipe(teacher: Path, judge: Callable[[str, bool], Path], tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """Of two steps of some seconds."""
    programs = rows(tmp_path_factory.mktemp("rows"))
    return lambda combination, adapters: _recipe(combination, teacher, lambda role: judge(role, adapters), programs)


@pytest.fixture(scope="session")
def plain(
    one: Ranks, recipe: Recipes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Combination], list[dict[str, Any]]]:
    """Metrics of what a combination learns, and from what, on the plain stack: made once."""
    made: dict[str, list[dict[str, Any]]] = {}

    def run(combination: Combination) -> list[dict[str, Any]]:
        c = attrs.evolve(
            combination, engine=combination.engine and "hf", mem=("fp32",), backend="single", optim="adamw"
        )
        content = recipe(c, lends(combination.mem))
        key = json.dumps(content, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("plain")
            one(content, folder / "run")
            made[key] = metrics(folder / "run")
        return made[key]

    return run


def _recipe(combination: Combination, teacher: Path, judge: Callable[[str], Path], programs: Path) -> dict[str, Any]:
    c = combination
    entry = loaded().find("algo", c.algo)
    assert isinstance(entry, AlgorithmEntry)
    once = {"epochs", "minibatches"} & set(fields(entry.config) if entry.config else ())
    roles = entry.roles(entry.config() if entry.config else None) if callable(entry.roles) else entry.roles
    given = {role.name: {"model": str(teacher)} for role in roles if role.start == "given"}
    judged: dict[str, Any] = {}
    if c.reward:
        source = loaded().find("reward", c.reward)
        assert isinstance(source, RewardEntry) and not callable(source.roles)
        given |= {role.name: {"model": str(judge(role.name))} for role in source.roles}
        judged = {"reward": {"name": c.reward, **OPTIONS.get(c.reward, {})}, "data": [str(programs)]}
    found: dict[str, Any] = {
        "roles": given, **judged,
        # One optimiser step a step, so that a step's loss is of the weights that the step before left.
        "algo": {"name": c.algo, **dict.fromkeys(sorted(once), 1)}, "mem": list(c.mem),
        "backend": c.backend, "batch_size": 6, "max_steps": 2, "eval_rows": 0,
        "save_every": 99, "track": "none",
        # Adam's own eps would turn rounding into a step of the whole rate wherever a gradient is about 0.
        "optim": {"name": c.optim, "learning_rate": 1e-4, "eps": 1e-3},
    }  # fmt: skip
    if c.engine:
        # Unheated, the model's answers are nearly all numbers, which are programs too, and of one length; a group of
        # equal rewards teaches nothing.
        heat = {"temperature": 2.0} if c.reward in ("length", "code") else {}
        found["engine"] = {"name": c.engine, "max_new_tokens": 6, **heat}
    return found


@pytest.mark.parametrize("combination", CASES)
def test_two_steps(
    combination: Combination, request: pytest.FixtureRequest, plain: Callable[[Combination], Any], recipe: Recipes,
    tmp_path: Path,
) -> None:  # fmt: skip
    c = combination
    if "bf16" in c.mem and "bf16" not in facts.machine().provides:
        pytest.skip("this machine has no bfloat16")
    ranks: Ranks = request.getfixturevalue("one" if c.nproc == 1 else "two")
    ranks(recipe(c, lends(c.mem)), tmp_path / "run")
    found, expected = metrics(tmp_path / "run"), plain(c)
    assert [line["step"] for line in found] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in found)
    moved = [line["optim/grad_norm"] for line in found if not line.get("optim/skipped")]
    assert all(0 < norm < math.inf for norm in moved) and (moved or "fp16" in c.mem)
    same = 1 if c.optim != "adamw" or "lora" in c.mem else 2
    for ours, theirs in list(zip(found, expected, strict=True))[:same]:
        for name in ("loss", "policy/entropy"):  # a loss may be about 0 whatever was sampled; the entropy never is
            if name in theirs and not (name == "loss" and judged_otherwise(c, ours, theirs)):
                assert ours[name] == pytest.approx(theirs[name], **apart(c)), (name, ours["step"])


def judged_otherwise(c: Combination, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Weights that are not quite the plain stack's have sampled another token here or there, and it was worth more or
    less: with rewards of 0 and 1 the loss is then another by a sixth of a response's."""
    rewards = [name for name in theirs if name.startswith("reward/")]
    rounded = bool(QUANTISED & set(c.mem)) or "fp32" not in c.mem
    return rounded and any(abs(ours[name] - theirs[name]) > 1e-6 for name in rewards)


def apart(c: Combination) -> dict[str, float]:
    """How far the losses and entropies may be apart."""
    if QUANTISED & set(c.mem):  # weights of a tiny model, to an eighth or so of their size
        return {"rel": 0.2, "abs": 0.2}
    if "fp32" not in c.mem:  # products to 2^-8; and what is sampled of it, another token here and there
        return {"rel": 0.02, "abs": 0.1 if c.engine else 0.01}
    return {"rel": 1e-4, "abs": 1e-5}  # sums in another order


@pytest.mark.matrix
def test_every_legal_pair_and_triple_is_run(installed: Registry) -> None:
    """What the list lacks of what is legal here, if anything: then write it anew."""
    kinds = classes(installed)
    wanted = set().union(*(covered(c, kinds) for c in legal(installed)))
    there = set().union(*(covered(c, kinds) for c in CHOSEN))
    assert not wanted - there, "python tests/combinations/cover.py"
    assert {c.algo for c in CHOSEN} == set(kinds)
    assert all(sum(c.algo == algo for c in CHOSEN) >= 2 for algo in kinds)


def test_a_dropped_pair_is_missed() -> None:
    """Of three combinations, two have every pair but one."""
    a = Combination("sft", "", ("fp32",), "", "single", "adamw")
    b = Combination("sft", "", ("fp32",), "", "ddp", "adamw")
    c = Combination("sft", "", ("lora",), "", "ddp", "adamw")
    kinds = {"sft": "sft"}
    assert set(choose([a, b, c], kinds)) == {a, b, c}
    lost = covered(b, kinds) - covered(a, kinds) - covered(c, kinds)
    assert lost == {frozenset((("mem", "fp32"), ("backend", "ddp")))}


def test_a_dropped_pair_of_a_reward_is_missed() -> None:
    """A reward's pair with an algorithm is one of them, and so is that with a memory strategy."""
    a = Combination("ppo", "hf", ("fp32",), "answer", "single", "adamw")
    b = Combination("ppo", "hf", ("fp32",), "model", "single", "adamw")
    c = Combination("grpo", "hf", ("fp32",), "model", "single", "adamw")
    kinds = {"ppo": "ppo", "grpo": "grpo"}
    assert covered(b, kinds) - covered(a, kinds) - covered(c, kinds) == {
        frozenset((("algo", "ppo"), ("reward", "model")))
    }
    d = attrs.evolve(b, mem=("bf16",))
    assert frozenset((("mem", "bf16"), ("reward", "model"))) in covered(d, kinds) - covered(b, kinds)


def test_a_line_is_read_as_it_was_written() -> None:
    judged = Combination("ppo", "hf", ("fp32", "lora"), "model", "ddp", "adamw")
    unjudged = Combination("sft", "", ("fp32",), "", "single", "adamw")
    assert [parse(line(c)) for c in (judged, unjudged)] == [judged, unjudged]
    assert (judged.name, unjudged.name) == ("ppo-hf-fp32+lora-model-ddp-adamw", "sft-offline-fp32-single-adamw")


def test_the_few_have_every_value() -> None:
    for pick in ("algo", "engine", "reward", "backend", "optim"):
        assert {getattr(c, pick) for c in FEW} == {getattr(c, pick) for c in CHOSEN}
    assert {name for c in FEW for name in c.mem} == {name for c in CHOSEN for name in c.mem}
    assert len(FEW) < len(CHOSEN) / 2


def test_the_docs_say_how_many_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert f"Those, {len(CHOSEN)} now, are listed in" in text
