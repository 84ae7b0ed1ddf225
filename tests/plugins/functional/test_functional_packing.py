"""Best fit decreasing: the worked example, ties, what cannot fit, and a naive version of the same rule."""

from __future__ import annotations

import random
import time

import pytest

from rlhf_plugins.functional.packing import pack


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, in quadratic time: longest first, into the fullest bin with room, the earliest of equals."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [capacity - sum(lengths[j] for j in members) for members in bins]
        fits = [(room, b) for b, room in enumerate(rooms) if room >= lengths[i]]
        if fits:
            bins[min(fits)[1]].append(i)
        else:
            bins.append([i])
    return bins


def test_worked_example() -> None:
    """[[1,2,3],[4,5,6,7],[8]] in rows of 4 -> [[4,5,6,7],[1,2,3,8]]."""
    examples = [[1, 2, 3], [4, 5, 6, 7], [8]]
    bins = pack([len(e) for e in examples], 4)
    assert bins == [[1], [0, 2]]
    assert [[t for i in members for t in examples[i]] for members in bins] == [[4, 5, 6, 7], [1, 2, 3, 8]]


def test_best_fit_is_not_first_fit() -> None:
    """7 | 5 + 4 leave 3 and 1; the 1 goes where it leaves nothing, where first fit would put it with the 7."""
    assert pack([7, 5, 4, 1], 10) == [[0], [1, 2, 3]]


def test_decreasing_is_not_in_order() -> None:
    """In the order given, 1, 2, 3, 4 would take three rows of 5: 1 + 2, 3, 4."""
    assert pack([1, 2, 3, 4], 5) == [[3, 0], [2, 1]]


def test_ties_keep_their_order() -> None:
    assert pack([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]
    assert pack([3, 3, 1, 1], 4) == [[0, 2], [1, 3]]


def test_same_bins_as_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(300):
        capacity = rng.randint(1, 40)
        lengths = [rng.randint(0, capacity) for _ in range(rng.randint(0, 40))]
        assert pack(lengths, capacity) == naive(lengths, capacity)


def test_edges() -> None:
    assert pack([], 4) == []
    assert pack([4], 4) == [[0]]
    assert pack([0, 0], 1) == [[0, 1]]
    assert pack([4, 0, 4], 4) == [[0, 1], [2]]  # an empty example fits a full row


def test_what_cannot_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"example 1 of 5 tokens, example 3 of 9 tokens"):
        pack([4, 5, 1, 9], 4)
    with pytest.raises(ValueError, match=r"example 0 of -1 tokens"):
        pack([-1], 4)
    with pytest.raises(ValueError, match="capacity > 0"):
        pack([], 0)


def test_time_is_not_quadratic() -> None:
    """60 000 examples that all open a bin: quadratic is 1.8e9 steps, minutes; n log n is about a second."""
    started = time.process_time()
    assert len(pack([5000 + i % 3000 for i in range(60_000)], 8192)) == 60_000
    assert time.process_time() - started < 20  # wide: a busy machine is ten times slower, not a hundred
