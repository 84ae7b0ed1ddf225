"""Slots of keys and values, by hand: what is written where, and what the model sees of it."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from rlhf_plugins.engines.slots import SlotCache


def prefilled(*rows: tuple[float, ...]) -> DynamicCache:
    """Two layers: the second one's keys are ten times the first one's, and values are negative keys."""
    cache = DynamicCache()
    for layer, scale in enumerate((1.0, 10.0)):
        k = torch.tensor(rows)[:, None, :, None] * scale  # [rows, 1, T, 1]
        cache.update(k, -k, layer)
    return cache


def held(cache: SlotCache, layer: int = 0) -> list[list[float]]:
    """Keys of every slot in use, all columns; values are their negatives."""
    found = cache.layers[layer]
    assert torch.equal(found.values, -found.keys)
    return found.keys[: cache.rows, 0, :, 0].tolist()


def made() -> SlotCache:
    """Capacity 6, ending at column 4: slots [1 2 3 4], [5 6] and [7 8 9], each at the end."""
    cache = SlotCache(slots=3, capacity=6, end=4)
    cache.enter(prefilled((1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 5.0, 6.0)), row=0, length=4)
    cache.enter(prefilled((1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 5.0, 6.0)), row=1, length=2)
    cache.enter(prefilled((7.0, 8.0, 9.0)), row=0, length=3)
    return cache


def test_each_enters_the_next_slot_and_ends_at_the_common_column() -> None:
    cache = made()
    rows = [[1, 2, 3, 4, 0, 0], [0, 0, 5, 6, 0, 0], [0, 7, 8, 9, 0, 0]]
    assert cache.rows == 3 and held(cache) == rows
    assert held(cache, layer=1) == [[10 * x for x in row] for row in rows]
    assert not any(cache.is_sliding) and cache.layers[0].get_max_length() == -1  # no window, no end
    assert len(cache.layers) == 2 and cache.layers[0].keys.shape == (3, 1, 6, 1)


def test_a_step_is_written_behind_the_end_and_seen_from_the_start() -> None:
    cache = made()
    cache.start = 1
    step = torch.tensor([11.0, 12.0, 13.0]).view(3, 1, 1, 1)
    assert cache.get_seq_length() == 3 and cache.layers[0].get_mask_sizes(1) == (4, 0)
    seen, values = cache.update(step, -step, 0)
    assert seen[:, 0, :, 0].tolist() == [[2, 3, 4, 11], [0, 5, 6, 12], [7, 8, 9, 13]]
    assert torch.equal(values, -seen)
    assert held(cache) == [[1, 2, 3, 4, 11, 0], [0, 0, 5, 6, 12, 0], [0, 7, 8, 9, 13, 0]]
    two = torch.tensor([[21.0, 31.0], [22.0, 32.0], [23.0, 33.0]])[:, None, :, None]
    assert cache.update(two, -two, 0)[0][1, 0, :, 0].tolist() == [0, 5, 6, 22, 32]
    assert cache.end == 4  # the engine moves it on once every layer has been written


def test_who_leaves_gives_the_slot_to_the_last_one() -> None:
    cache = made()
    cache.leave(0)
    assert held(cache) == [[0, 7, 8, 9, 0, 0], [0, 0, 5, 6, 0, 0]]
    cache.leave(1)  # the last one itself
    assert held(cache) == [[0, 7, 8, 9, 0, 0]] and held(cache, layer=1) == [[0, 70, 80, 90, 0, 0]]
    cache.enter(prefilled((5.0, 6.0)), row=0, length=2)
    assert [row[2:4] for row in held(cache)] == [[8, 9], [5, 6]]


def test_what_is_seen_is_moved_as_it_was_even_onto_itself() -> None:
    cache = made()
    cache.start = 0
    cache.move(6)
    assert (cache.start, cache.end) == (2, 6)
    assert [row[2:] for row in held(cache)] == [[1, 2, 3, 4], [0, 0, 5, 6], [0, 7, 8, 9]]
    cache.move(5)
    assert (cache.start, cache.end) == (1, 5)
    assert [row[1:5] for row in held(cache)] == [[1, 2, 3, 4], [0, 0, 5, 6], [0, 7, 8, 9]]
