"""How a step's work is cut over ranks: whole units, alike in cost, the same cut on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def share(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which units each rank takes, in order.

    The dearest unit first, each to the rank with the least so far: no rank has more than 4/3 of what the best cut
    would give it (Graham 1969). Ties go to the rank with the fewest units, then to the first, so that every rank has
    some where there are enough.
    """
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit)):
        least = min(range(ranks), key=lambda rank: (loads[rank], len(taken[rank]), rank))
        taken[least].append(unit)
        loads[least] += costs[unit]
    return [sorted(units) for units in taken]
