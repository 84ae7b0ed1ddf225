"""Keys and values of sequences that are decoded together: written in place, nothing moved but what must be.

A cache of transformers that grows by concatenation copies all of itself for every token. Here each sequence has a slot
in buffers of a fixed capacity. All slots end at one column; a sequence that ends gives its slot to the last one, a new
one is written into the next free slot, and both cost one sequence's copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers, [slots, heads, columns, head dimension]."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(like: Tensor) -> Tensor:  # zeros, since a masked NaN is still a NaN
            return like.new_zeros(self.cache.slots, like.shape[1], self.cache.capacity, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, start, end = self.cache.rows, self.cache.start, self.cache.end
        to = end + key_states.shape[2]
        self.keys[:rows, :, end:to] = key_states
        self.values[:rows, :, end:to] = value_states
        return self.keys[:rows, :, start:to], self.values[:rows, :, start:to]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.end - self.cache.start

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    """The cache handed to a model: it sees the first `rows` slots, in columns `start` to `end`."""

    def __init__(self, slots: int, capacity: int, end: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.capacity = capacity
        self.rows = 0
        self.start = end
        self.end = end

    def enter(self, prefill: Cache, row: int, length: int) -> None:
        """Write the last `length` columns of a prefill's row into the next free slot."""
        for i, source in enumerate(prefill.layers):
            if i == len(self.layers):
                self.layers.append(_Layer(self))
            layer = self.layers[i]
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[self.rows, :, self.end - length : self.end] = source.keys[row, :, -length:]
            layer.values[self.rows, :, self.end - length : self.end] = source.values[row, :, -length:]
        self.rows += 1

    def leave(self, row: int) -> None:
        """Free a slot; the last one takes its place."""
        self.rows -= 1
        if row != self.rows:
            for layer in self.layers:
                for buffer in (layer.keys, layer.values):
                    buffer[row, :, : self.end] = buffer[self.rows, :, : self.end]

    def move(self, end: int) -> None:
        """Shift what is seen so that it ends at another column."""
        width = self.end - self.start
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                seen = buffer[: self.rows, :, self.start : self.end].clone()  # the two ranges may overlap
                buffer[: self.rows, :, end - width : end] = seen
        self.start, self.end = end - width, end
