"""Packing examples into rows of a fixed capacity with little waste, and without cutting any.

Best fit decreasing (Johnson 1974, "Fast Algorithms for Bin Packing"; for language models Ding et al. 2024,
arXiv:2404.10830): longest first, each into the open bin it leaves the least room in.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, each bin's lengths summing to at most `capacity` tokens.

    Deterministic: equal lengths keep their order, and among equally full bins the earliest opened wins. Bins come in
    the order they were opened, indices in the order they were put in. Time O(n log n + n log capacity), memory
    O(n + capacity).

    lengths: tokens an example, >= 0. capacity: tokens a bin, > 0.
    Raises: ValueError naming every example that is longer than `capacity`, or negative; nothing is truncated here.
    """
    if capacity <= 0:
        raise ValueError(f"expected capacity > 0, given {capacity}")
    unfit = [f"example {i} of {n} tokens" for i, n in enumerate(lengths) if not 0 <= n <= capacity]
    if unfit:
        raise ValueError(f"expected lengths from 0 to the capacity, {capacity}, given {', '.join(unfit)}")
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> heap of bin numbers
    rooms = _SmallestAtLeast(capacity)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # sorted is stable: ties keep their order
        room = rooms.find(lengths[i])
        if room is None:
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            chosen = heapq.heappop(open_bins[room])
            if not open_bins[room]:
                rooms.mark(room, False)
        bins[chosen].append(i)
        left = room - lengths[i]
        heapq.heappush(open_bins[left], chosen)
        rooms.mark(left, True)
    return bins


class _SmallestAtLeast:
    """A set of integers 0..top with "the smallest member >= x" in O(log top).

    A complete binary tree in an array, node k over nodes 2k and 2k + 1; a node is set if any leaf below it is.
    """

    def __init__(self, top: int) -> None:
        self._leaves = 1 << top.bit_length()  # > top
        self._any = bytearray(2 * self._leaves)

    def mark(self, x: int, member: bool) -> None:
        node = x + self._leaves
        self._any[node] = member
        while node > 1:
            node //= 2
            self._any[node] = self._any[2 * node] or self._any[2 * node + 1]

    def find(self, x: int) -> int | None:
        node = x + self._leaves
        while not self._any[node]:  # up, until a subtree at or right of x holds a member
            while node % 2 == 1:  # a right child: what is to its right hangs higher up
                node //= 2
            if node == 0:
                return None
            node += 1
        while node < self._leaves:  # down, to that subtree's smallest
            node = 2 * node if self._any[2 * node] else 2 * node + 1
        return node - self._leaves
