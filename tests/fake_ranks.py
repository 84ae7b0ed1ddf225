"""Two fake ranks: threads of this process, as the plugin author's kit makes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf.testing.ranks import on_ranks
from rlhf.world import World


def in_two_ranks(work: Callable[[int, World], Any]) -> list[Any]:
    """work(rank, world) in each; what they return, by rank. What one raises is raised."""
    return on_ranks([partial(work, rank) for rank in (0, 1)])
