"""A sharded run stopped and gone on with: to the bit by as many ranks, to rounding by another number of them, or by
another backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_cases import SHARDINGS, STEPS, recipe

from rlhf import checkpoint
from warm import Ranks, losses, metrics, model

FEW = {("sft", "zero2", False), ("dpo", "fsdp2", True), ("ppo", "zero3-offload", False)}
ALL = [(run, sharding, lora) for run in ("sft", "dpo", "ppo") for sharding in SHARDINGS for lora in (False, True)]
CASES = [pytest.param(*case, marks=pytest.mark.matrix if case in FEW else pytest.mark.matrix_full) for case in ALL]
MACHINE_DEPENDENT = ("time/", "perf/", "memory/")


def computed(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE_DEPENDENT)} for line in metrics(output)]


def half_way(run: Path, to: Path) -> Path:
    """The directory as a run leaves it that was killed after half of its steps."""
    shutil.copytree(run, to)
    found = checkpoint.whole(to / "checkpoints")
    for saved in found[len(found) // 2 :]:
        checkpoint.remove(saved.path)
    (to / "summary.json").unlink()
    shutil.rmtree(to / "model")
    return to


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(("run", "sharding", "lora"), CASES)
def test_resumed_by_as_many_ranks_is_the_same_to_the_bit(
    run: str, sharding: str, lora: bool, two: Ranks, tmp_path: Path
) -> None:
    every = {"save_every": STEPS[run] // 2}
    content = recipe(run, tmp_path, sharding, lora, **every)
    two(content, tmp_path / "run")
    again = half_way(tmp_path / "run", tmp_path / "again")
    assert [saved.step for saved in checkpoint.whole(again / "checkpoints")] == [STEPS[run] // 2]
    two(content, again, resume=True)
    assert computed(again) == computed(tmp_path / "run")
    assert far(model(again), model(tmp_path / "run")) == 0.0


@pytest.mark.matrix
def test_nothing_of_a_checkpoint_is_pickled_and_no_rank_writes_whole_tensors(two: Ranks, tmp_path: Path) -> None:
    two(recipe("sft", tmp_path, "zero3", max_steps=1), tmp_path / "run")
    [saved] = checkpoint.whole(tmp_path / "run" / "checkpoints")
    names = sorted(path.name for path in saved.path.iterdir())
    assert {"manifest.json", "rank-0.safetensors", "rank-1.safetensors", "state.json"} <= set(names)
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    sizes = [(saved.path / f"rank-{rank}.safetensors").stat().st_size for rank in (0, 1)]
    third = 567_296 * 4 / 2  # bytes of half the weights; a rank holds them and two moments
    assert sizes == pytest.approx([3 * third] * 2, rel=0.02)


OTHERS = [
    ("fsdp2", "fsdp2", 1), ("zero2", "zero2", 1), ("zero3", "zero3", 1), ("zero3", "", 1), ("fsdp2", "", 1),
    ("", "fsdp2", 2), ("", "zero1", 2), ("", "zero3-offload", 2), ("fsdp2", "zero3", 2), ("zero3", "ddp", 2),
]  # fmt: skip
FEW_OTHERS = {("zero3", "zero3", 1), ("fsdp2", "", 1), ("", "zero1", 2)}


@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [pytest.param(*x, marks=pytest.mark.matrix if x in FEW_OTHERS else pytest.mark.matrix_full) for x in OTHERS],
)
def test_resumed_by_others_is_the_same_to_rounding(
    before: str, after: str, ranks: int, one: Ranks, two: Ranks, alone: Callable[..., Path], tmp_path: Path
) -> None:
    """`before` is of two ranks, or of one process where it says nothing of sharding."""

    def content(sharding: str) -> dict[str, Any]:
        if sharding == "ddp":
            return recipe("sft", tmp_path, backend="ddp")
        return recipe("sft", tmp_path, sharding)

    (two if before else one)(content(before), tmp_path / "run")
    again = half_way(tmp_path / "run", tmp_path / "again")
    (one if ranks == 1 else two)(content(after), again, resume=True)
    expected = alone("sft")
    # as of runs that were never stopped: see test_sharded_equal
    assert losses(again) == pytest.approx(losses(expected), abs=1e-5)
    assert far(model(again), model(expected)) < 3e-5
    assert json.loads((again / "summary.json").read_text())["status"] == "done"
