"""Ranks as threads of this process, for what an algorithm tells the others of its part of a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.world import World


class _Rank(World):
    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self._board, self._barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def sum(self, x: Tensor) -> Tensor:
        wide = x.detach().double() if x.dtype.is_floating_point else x.long()
        return torch.stack(self.gather(wide)).sum(0).to(x.dtype)

    def max(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather(x)).amax(0)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self.gather(value)[source]

    def barrier(self) -> None:
        self._barrier.wait()


def on_ranks(work: Sequence[Callable[[World], Any]], seconds: float = 30.0) -> list[Any]:
    """Carry out each rank's work at once; returns what each found.

    Raises:
        Exception: what the first of them raised, or BrokenBarrierError where one waited for others in vain.
    """
    board: list[Any] = [None] * len(work)
    found: list[Any] = [None] * len(work)
    errors: list[Exception] = []
    waited: list[Exception] = []
    barrier = threading.Barrier(len(work), timeout=seconds)

    def one(rank: int) -> None:
        try:
            found[rank] = work[rank](_Rank(rank, board, barrier))
        except threading.BrokenBarrierError as error:
            waited.append(error)
        except Exception as error:
            errors.append(error)
        finally:
            if errors or waited:
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors or waited:
        raise (errors or waited)[0]
    return found
