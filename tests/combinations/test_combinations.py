"""Two real steps of each chosen combination on a tiny model, its numbers beside those of the plain stack in float32.

The first step's loss is of weights that nothing has trained yet, so every stack has the plain one's, to what its
precision rounds away. Where a stack changes neither the optimiser nor what is trained, so is the second's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cover import Combination, choose, classes, covered, first_of_each, legal, read
from safetensors.torch import load_file, save_file

from rlhf import facts
from rlhf.entries import AlgorithmEntry
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


@pytest.fixture(scope="session")
def plain(one: Ranks, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Metrics of an algorithm on the plain stack: made once."""
    made: dict[str, list[dict[str, Any]]] = {}

    def run(algo: str) -> list[dict[str, Any]]:
        if algo not in made:
            folder = tmp_path_factory.mktemp("plain")
            engine = "hf" if online(algo) else ""
            one(recipe(Combination(algo, engine, ("fp32",), "single", "adamw"), teacher), folder / "run")
            made[algo] = metrics(folder / "run")
        return made[algo]

    return run


def online(algo: str) -> bool:
    entry = loaded().find("algo", algo)
    assert isinstance(entry, AlgorithmEntry)
    return "rollouts" in entry.requires


def recipe(combination: Combination, teacher: Path) -> dict[str, Any]:
    """Two steps of some seconds."""
    c = combination
    entry = loaded().find("algo", c.algo)
    assert isinstance(entry, AlgorithmEntry)
    once = {"epochs", "minibatches"} & set(fields(entry.config) if entry.config else ())
    roles = entry.roles(entry.config() if entry.config else None) if callable(entry.roles) else entry.roles
    found: dict[str, Any] = {
        "roles": {role.name: {"model": str(teacher)} for role in roles if role.start == "given"},
        # One optimiser step a step, so that a step's loss is of the weights that the step before left.
        "algo": {"name": c.algo, **dict.fromkeys(sorted(once), 1)}, "mem": list(c.mem),
        "backend": c.backend, "batch_size": 6, "max_steps": 2, "eval_rows": 0,
        "save_every": 99, "track": "none",
        # Adam's own eps would turn rounding into a step of the whole rate wherever a gradient is about 0.
        "optim": {"name": c.optim, "learning_rate": 1e-4, "eps": 1e-3},
    }  # fmt: skip
    return {**found, "engine": {"name": c.engine, "max_new_tokens": 6}} if c.engine else found


@pytest.mark.parametrize("combination", CASES)
def test_two_steps(
    combination: Combination, request: pytest.FixtureRequest, plain: Callable[[str], Any], teacher: Path, tmp_path: Path
) -> None:
    c = combination
    if "bf16" in c.mem and "bf16" not in facts.machine().provides:
        pytest.skip("this machine has no bfloat16")
    ranks: Ranks = request.getfixturevalue("one" if c.nproc == 1 else "two")
    ranks(recipe(c, teacher), tmp_path / "run")
    found, expected = metrics(tmp_path / "run"), plain(c.algo)
    assert [line["step"] for line in found] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in found)
    moved = [line["optim/grad_norm"] for line in found if not line.get("optim/skipped")]
    assert all(0 < norm < math.inf for norm in moved) and (moved or "fp16" in c.mem)
    same = 1 if c.optim != "adamw" or "lora" in c.mem else 2
    for ours, theirs in list(zip(found, expected, strict=True))[:same]:
        for name in ("loss", "policy/entropy"):  # a loss may be about 0 whatever was sampled; the entropy never is
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], **apart(c)), (name, ours["step"])


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
    a = Combination("sft", "", ("fp32",), "single", "adamw")
    b = Combination("sft", "", ("fp32",), "ddp", "adamw")
    c = Combination("sft", "", ("lora",), "ddp", "adamw")
    kinds = {"sft": "sft"}
    assert set(choose([a, b, c], kinds)) == {a, b, c}
    lost = covered(b, kinds) - covered(a, kinds) - covered(c, kinds)
    assert lost == {frozenset((("mem", "fp32"), ("backend", "ddp")))}


def test_the_few_have_every_value() -> None:
    for pick in ("algo", "engine", "backend", "optim"):
        assert {getattr(c, pick) for c in FEW} == {getattr(c, pick) for c in CHOSEN}
    assert {name for c in FEW for name in c.mem} == {name for c in CHOSEN for name in c.mem}
    assert len(FEW) < len(CHOSEN) / 2


def test_the_docs_say_how_many_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert f"Those, {len(CHOSEN)} now, are listed in" in text
