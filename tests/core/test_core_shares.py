"""How work is cut over ranks."""

from __future__ import annotations

import random

import pytest

from rlhf.shares import share


def test_the_dearest_first_each_to_the_rank_with_least() -> None:
    # 9 to rank 0, 7 to 1, 6 to 1 (13), 5 to 0 (14), 2 to 1 (15), 1 to 0 (15)
    assert share([5, 9, 1, 7, 6, 2], 2) == [[0, 1, 2], [3, 4, 5]]


def test_one_rank_has_all_in_order() -> None:
    assert share([3, 1, 2], 1) == [[0, 1, 2]]


def test_every_rank_has_some_where_there_are_enough() -> None:
    assert [len(units) for units in share([0] * 7, 3)] == [3, 2, 2]
    assert share([4, 4], 3) == [[0], [1], []]
    assert share([], 2) == [[], []]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_no_rank_has_much_more_than_its_part(ranks: int) -> None:
    draw = random.Random(ranks)
    for _ in range(50):
        costs = [draw.randint(1, 500) for _ in range(draw.randint(ranks, 60))]
        units = share(costs, ranks)
        assert sorted(unit for part in units for unit in part) == list(range(len(costs)))
        most = max(sum(costs[unit] for unit in part) for part in units)
        best = max(sum(costs) / ranks, max(costs))  # no cut is better than this
        assert most <= best * 4 / 3 + max(costs) / 3 + 1e-9
