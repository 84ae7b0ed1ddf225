"""Advantages within groups: the worked numbers, groups in any order, and what no group can do."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_plugins.functional.advantages import moments
from rlhf_plugins.functional.groups import (
    best_and_worst,
    best_of_groups,
    each_normalised,
    group_advantages,
    group_stats,
    leave_one_out,
    less_baseline,
    tied_for_best,
)

F64 = torch.float64
EXACT = 1e-12  # float64 values of order 1 after a few operations
WORKED = 5e-7  # numbers written down to six digits


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


REWARDS = f64(1, 0, 0, 1, 1, 0, 0, 0)
ONE = torch.zeros(8, dtype=torch.long)


def test_grpo_of_one_group() -> None:
    """Mean .375, unbiased variance (3 x .625^2 + 5 x .375^2) / 7 = .267857, deviation .517549."""
    found = group_advantages(REWARDS, ONE).tolist()
    assert found == pytest.approx([1.207381 if r else -0.724429 for r in REWARDS], abs=WORKED)
    assert found[0] == pytest.approx(0.625 / (math.sqrt(1.875 / 7) + 1e-4), abs=EXACT)


def test_without_scaling() -> None:
    assert group_advantages(REWARDS, ONE, scale=False).tolist() == [0.625 if r else -0.375 for r in REWARDS]


def test_leave_one_out_of_one_group() -> None:
    """1 - 2/7 = .714286 and 0 - 3/7 = -.428571."""
    expected = [5 / 7 if r else -3 / 7 for r in REWARDS]
    assert leave_one_out(REWARDS, ONE).tolist() == pytest.approx(expected, abs=EXACT)
    assert expected[0] == pytest.approx(0.714286, abs=WORKED) and expected[1] == pytest.approx(-0.428571, abs=WORKED)


def test_groups_are_told_apart_wherever_their_responses_are() -> None:
    rewards, group = f64(1, 10, 3, 30, 5), ints(7, 2, 7, 2, 7)
    stats = group_stats(rewards, group)
    assert stats.mean.tolist() == [3, 20, 3, 20, 3]
    assert stats.std.tolist() == pytest.approx([2, math.sqrt(200), 2, math.sqrt(200), 2], abs=EXACT)
    assert stats.size.tolist() == [3, 2, 3, 2, 3]
    assert group_advantages(rewards, group, scale=False).tolist() == [-2, -10, 0, 10, 2]
    assert leave_one_out(rewards, group).tolist() == pytest.approx([1 - 4, 10 - 30, 3 - 3, 30 - 10, 5 - 2], abs=EXACT)


def test_scaled_by_the_batch() -> None:
    """All five about their mean 9.8: squares 77.44 + .04 + 46.24 + 408.04 + 23.04 = 554.8, over 4."""
    rewards, group = f64(1, 10, 3, 30, 5), ints(7, 2, 7, 2, 7)
    found = group_advantages(rewards, group, batch=moments(rewards))
    by = math.sqrt(554.8 / 4) + 1e-4
    assert found.tolist() == pytest.approx([x / by for x in (-2, -10, 0, 10, 2)], abs=EXACT)


def test_flat_groups_have_no_advantage_and_are_known() -> None:
    rewards, group = (
        torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2]),
        ints(0, 0, 0, 1, 1),
    )  # float32
    assert group_stats(rewards, group).flat.tolist() == [True, True, True, False, False]
    assert group_advantages(rewards, group)[:3].tolist() == [0.0, 0.0, 0.0]
    alone = group_stats(f64(4), ints(3))
    assert alone.flat.tolist() == [True] and alone.std.tolist() == [0.0]
    assert leave_one_out(f64(4), ints(3)).tolist() == [0.0]


def test_large_rewards_keep_their_spread() -> None:
    """1e8 + 0, 1, 2: the difference of squares would be lost even in float64."""
    stats = group_stats(f64(1e8, 1e8 + 1, 1e8 + 2), ints(0, 0, 0))
    assert stats.std.tolist() == [1.0, 1.0, 1.0]


def test_no_rewards() -> None:
    none, groups = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert len(group_advantages(none, groups)) == len(leave_one_out(none, groups)) == 0
    assert len(best_of_groups(none, groups, 1)) == 0


def test_each_reward_is_normalised_in_its_group() -> None:
    """Right or wrong (deviation .707107) and a length in the hundreds: each of +-.5 and +-50 counts as +-.707."""
    right, length, group = f64(1, 0), f64(100, 200), ints(0, 0)
    found = each_normalised({"right": right, "length": length}, {"right": 1.0, "length": -0.5}, group)
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000) + 1e-4)
    assert found.tolist() == pytest.approx([a + 0.5 * b, -a - 0.5 * b], abs=EXACT)


def test_a_reward_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight for each reward"):
        each_normalised({"right": f64(1, 0)}, {"rihgt": 1.0}, ints(0, 0))
    with pytest.raises(ValueError, match="a weight for each reward"):
        each_normalised({}, {}, ints(0, 0))


def test_the_best_of_each_group() -> None:
    x, group = f64(3, 9, 3, 8, 1, 7), ints(5, 1, 5, 1, 5, 1)
    assert best_of_groups(x, group, 2).tolist() == [True, True, True, True, False, False]
    assert best_of_groups(x, group, 1).tolist() == [True, True, False, False, False, False]  # of equal ones the first
    assert best_of_groups(x, group, 9).all()
    with pytest.raises(ValueError, match="keep >= 1"):
        best_of_groups(x, group, 0)


def test_the_best_and_the_worst_of_each_group_that_has_them() -> None:
    """Groups 5 and 1 interleaved, 2 flat, 3 of one response; of equal best and worst ones the first."""
    x, group = f64(3, 9, 1, 9, 3, 7, 1, 4, 4, 6), ints(5, 1, 5, 1, 5, 1, 5, 2, 2, 3)
    assert best_and_worst(x, group).tolist() == [[1, 5], [0, 2]]
    assert best_and_worst(x[7:], group[7:]).shape == (0, 2)
    assert best_and_worst(f64(), ints()).shape == (0, 2)


def test_who_shares_the_best_place() -> None:
    """Two nines of three; one seven; all fours, which is no tie but nothing to tell apart; one alone."""
    x, group = f64(9, 7, 9, 6, 8, 4, 6, 4, 5), ints(0, 1, 0, 1, 0, 2, 1, 2, 3)
    assert tied_for_best(x, group).tolist() == [True, False, True, False, True, False, False, False, False]
    assert len(tied_for_best(f64(), ints())) == 0


def test_bad_shapes_are_refused() -> None:
    for function in (group_stats, group_advantages, leave_one_out):
        with pytest.raises(ValueError, match="of one length"):
            function(f64(1, 2), ints(0))
    with pytest.raises(ValueError, match="eps >= 0"):
        group_advantages(f64(1, 2), ints(0, 0), eps=-1.0)


def test_advantages_carry_no_gradient() -> None:
    rewards = f64(1, 0).requires_grad_()
    assert not group_advantages(rewards, ints(0, 0)).requires_grad
    assert not leave_one_out(rewards, ints(0, 0)).requires_grad


def test_less_a_baseline_of_each_group() -> None:
    found = less_baseline(f64(1, 2, 3), ints(7, 4, 7), f64(0.5, 1.0), ints(4, 7))
    assert found.tolist() == [0.0, 1.5, 2.0]
    with pytest.raises(ValueError, match="one baseline a group"):
        less_baseline(f64(1, 2), ints(7, 4), f64(0.5), ints(4))
    with pytest.raises(ValueError, match="one baseline a group"):
        less_baseline(f64(1), ints(4), f64(0.5, 0.5), ints(4, 4))
