"""What a rank holds, and what it does where one process would do something special."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded_cases import SHARDINGS, recipe

from warm import Ranks

FEW = ("fsdp2", "zero2", "zero3-offload")
EVERY = [pytest.param(x, marks=pytest.mark.matrix if x in FEW else pytest.mark.matrix_full) for x in SHARDINGS]


@pytest.mark.matrix
@pytest.mark.parametrize("sharding", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_rank_holds_its_share(sharding: str, two: Ranks, tmp_path: Path) -> None:
    ranks = two.probe("held", recipe("sft", tmp_path, sharding))
    whole = ranks[0]["whole"]
    assert whole == 567_296  # 331 x 128 tied, 2 layers of 4 x 128 x 128 + 3 x 128 x 512, 5 norms of 128
    total = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    # DeepSpeed pads its flat parts, by fewer than 8 elements a group here, and 2 groups there are at most
    padding = 16
    half = pytest.approx(whole / 2, abs=padding)
    if sharding == "fsdp2":
        assert total["parameters"] == total["gradients"] == total["after"] == whole
        assert total["optimizer"] == 2 * whole
        row = 128  # whole rows are dealt, and the embedding has an odd number of them
        assert abs(ranks[0]["parameters"] - ranks[1]["parameters"]) == row
        return
    for rank in ranks:  # weights are computed with, masters stepped: in fp32 DeepSpeed holds both
        assert rank["masters"] == half
        assert rank["optimizer"] == pytest.approx(whole, abs=2 * padding)  # two moments of a half
        assert rank["parameters"] == (half if sharding == "zero3" else whole)
        if sharding == "zero2":  # a gradient that the cut goes through stays whole on both sides: 512 x 128 at most
            assert whole / 2 - padding <= rank["gradients"] <= whole / 2 + 512 * 128
        else:
            assert rank["gradients"] == (whole if sharding == "zero1" else half)


@pytest.mark.parametrize("sharding", EVERY)
def test_one_ranks_infinite_gradient_skips_the_step_of_all(sharding: str, two: Ranks, tmp_path: Path) -> None:
    for rank in two.probe("skipped", recipe("sft", tmp_path, sharding)):
        assert rank["skipped"] == [True, False]
        assert rank["norms"][0] in ("inf", "nan")
        assert rank["unchanged"] and rank["changed"]


@pytest.mark.parametrize("sharding", EVERY)
def test_a_role_without_a_gradient_is_left_alone(sharding: str, one: Ranks, two: Ranks, tmp_path: Path) -> None:
    """As while a critic warms up: its moments don't decay, its step isn't counted, and no old gradient is applied."""
    [single] = one.probe("idle", recipe("ppo", tmp_path))
    for rank in two.probe("idle", recipe("ppo", tmp_path, sharding)):
        for found, expected in zip(rank["steps"], single["steps"], strict=True):
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
            for role in ("policy", "value"):
                assert found[role] == pytest.approx(expected[role], rel=1e-6)


@pytest.mark.parametrize("sharding", EVERY)
def test_it_is_gathered_once_for_sampling(sharding: str, two: Ranks, tmp_path: Path) -> None:
    for rank in two.probe("alone", recipe("ppo", tmp_path, sharding)):
        assert rank == {"meetings": 0, "equal": True, "again": True}
