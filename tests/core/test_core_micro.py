"""Minibatches that don't depend on the number of ranks, and micro-batches where each forward is a meeting of ranks."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fake_ranks import in_two_ranks
from rlhf.experience import Experience
from rlhf.interfaces import Backend
from rlhf.micro import Units, add_up, micro_batches, totals_of
from rlhf.sequences import Sequences
from rlhf.world import World


def sequences(groups: list[int], lengths: list[int] | None = None) -> Sequences:
    sizes = lengths or [1] * len(groups)
    return Sequences.of(
        [torch.tensor([1])] * len(groups), [torch.full((n,), i) for i, n in enumerate(sizes)], group=groups
    )


WHOLE = [0, 0, 1, 2, 2, 2, 3, 4, 4]
PARTS = ([0, 0, 3], [1, 2, 2, 2, 4, 4])  # the groups that each rank has


@pytest.mark.parametrize("unit", ["sequence", "group"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_fake_ranks_take_the_minibatches_of_one(unit: Any, count: int) -> None:
    def members(groups: list[int], world: World) -> list[set[tuple[int, int]]]:
        nth = [groups[:i].count(group) for i, group in enumerate(groups)]
        units = Units(sequences(groups), unit, world)
        return [{(groups[i], nth[i]) for i in rows.tolist()} for rows in units.minibatches(count, 5)]

    one = members(WHOLE, World())
    if unit == "group":
        whole = {(group, nth) for group in range(5) for nth in range(WHOLE.count(group))}
        assert all({m for m in whole if m[0] == group} <= part for part in one for group, _ in part)  # none is cut
    else:
        assert {len(part) for part in one} <= {len(WHOLE) // count, -(-len(WHOLE) // count)}
    first, second = in_two_ranks(lambda rank, world: members(PARTS[rank], world))
    assert [a | b for a, b in zip(first, second, strict=True)] == one
    assert sum(map(len, one)) == len(WHOLE) and not any(a & b for a, b in zip(first, second, strict=True))


def test_a_rank_may_have_nothing() -> None:
    def work(rank: int, world: World) -> list[list[int]]:
        units = Units(sequences([] if rank else [0, 1, 2]), "sequence", world)
        return [rows.tolist() for rows in units.minibatches(2, 0)]

    first, second = in_two_ranks(work)
    assert sorted(row for rows in first for row in rows) == [0, 1, 2] and second == [[], []]


def test_totals_and_parts_of_means_are_of_all_fake_ranks() -> None:
    def work(rank: int, world: World) -> Any:
        own = {"a": torch.tensor(1.5), **({"b": torch.tensor(2.0)} if rank else {})}
        return totals_of(sequences(PARTS[rank]), world), add_up(own, world), add_up({}, world)

    first, second = in_two_ranks(work)
    assert first == second
    assert (first[0].tokens, first[0].sequences, first[0].groups) == (9, 9, 5)
    assert first[1:] == ({"a": 3.0, "b": 2.0}, {})


class Fake:
    device = "cpu"

    def __init__(self, world: World, sharded: bool) -> None:
        self.world, self.sharded = world, sharded


def batches(rank: int, world: World, lengths: Any, sharded: bool) -> list[tuple[list[int], float, bool]]:
    own = sequences([10 * rank + i // 2 for i in range(len(lengths[rank]))], lengths[rank])
    experience = Experience(own, {"x": torch.ones(len(own.tokens))})
    backend = cast(Backend, Fake(world, sharded))
    totals = totals_of(own, world)
    found = micro_batches(experience, totals, 6, True, backend)
    return [(batch.lengths.tolist(), weight, last) for batch, weight, last in found]


LENGTHS: Any = ([2, 1, 4, 5, 2, 2], [1, 3])


def test_ranks_make_as_many_micro_batches_as_they_have_work_for() -> None:
    first, second = in_two_ranks(lambda rank, world: batches(rank, world, LENGTHS, False))
    assert [len(first), len(second)] == [3, 1]
    assert [last for *_, last in first] == [False, False, True] and second == [([1, 3], 1.0, True)]


def test_where_forwards_are_meetings_they_make_the_same_number() -> None:
    first, second = in_two_ranks(lambda rank, world: batches(rank, world, LENGTHS, True))
    assert [weight for _, weight, _ in first] == [1.0, 1.0, 1.0]
    assert second == [([1, 3], 1.0, False), ([1, 3], 0.0, False), ([1, 3], 0.0, True)]


def test_there_a_rank_with_nothing_borrows_the_smallest_group() -> None:
    first, second = in_two_ranks(lambda rank, world: batches(rank, world, (LENGTHS[0], []), True))
    assert [weight for _, weight, _ in first] == [1.0] * 3
    assert second == [([2, 1], 0.0, False)] * 2 + [([2, 1], 0.0, True)]


def test_experience_comes_back_as_it_was_sent() -> None:
    own = Experience(sequences([0, 0, 1]), {"x": torch.rand(3)}, y=torch.rand(3))
    own.temperature = 0.7
    again = Experience.from_state(own.to_state())
    assert again.temperature == 0.7 and torch.equal(again["x"], own["x"]) and torch.equal(again["y"], own["y"])
    assert torch.equal(again.sequences.group, own.sequences.group)
    other: Tensor = again.sequences.prompt(2)
    assert torch.equal(other, own.sequences.prompt(2))
