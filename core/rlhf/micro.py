"""Minibatches, the same for any number of ranks, and the micro-batches that a rank makes of its part of one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import RunError
from rlhf.experience import Batch, Experience, Totals
from rlhf.interfaces import Backend
from rlhf.scoring import cut
from rlhf.sequences import Sequences
from rlhf.world import World


class Units:
    """What minibatches are drawn from: sequences or groups, in an order that all ranks agree on."""

    def __init__(self, sequences: Sequences, unit: Literal["sequence", "group"], world: World) -> None:
        group = sequences.group
        own = torch.stack([group, torch.zeros_like(group) if unit == "group" else _places(group)], dim=1)  # [B, 2]
        parts = world.gather(own)
        # Groups are numbered over all ranks, so that this order is that of one process: by group, then by place in it.
        self._all, of = torch.unique(torch.cat(parts), dim=0, return_inverse=True)
        first = sum(len(part) for part in parts[: world.rank])
        self._own = of[first : first + len(own)]  # [B], the unit of each row of this rank

    def __len__(self) -> int:
        """Units of all ranks."""
        return len(self._all)

    def minibatches(self, count: int, seed: int) -> Iterator[Tensor]:
        """This rank's rows of each minibatch, int64, perhaps none."""
        order = np.random.default_rng(seed).permutation(len(self))
        for part in np.array_split(order, min(count, len(self))):
            yield torch.isin(self._own, torch.from_numpy(part)).nonzero().flatten()


def _places(group: Tensor) -> Tensor:
    """For each row, how many of its group come before it. int64 [B]."""
    seen: dict[int, int] = {}
    found = []
    for number in group.tolist():
        found.append(seen.get(number, 0))
        seen[number] = found[-1] + 1
    return torch.tensor(found, dtype=torch.long)


def totals_of(sequences: Sequences, world: World) -> Totals:
    """Counts over all ranks."""
    counts = torch.tensor([sequences.token_count, len(sequences), sequences.group_count])
    return Totals(*(int(n) for n in world.sum(counts).tolist()))


def micro_batches(
    minibatch: Experience, totals: Totals, budget: int, keep_groups: bool, backend: Backend
) -> Iterator[tuple[Batch, float, bool]]:
    """This rank's micro-batches: (batch, its weight, whether it is the rank's last of the step).

    Where each forward is a meeting of ranks, all make as many: those with less work repeat a group at weight 0, and a
    rank that has none at all borrows one.
    """
    pieces = list(cut(minibatch.sequences, budget, keep_groups))
    count = len(pieces)
    if backend.sharded:
        count = int(backend.world.max(torch.tensor(len(pieces))))
        minibatch, pieces = _filled(minibatch, pieces, backend.world)
    for i in range(count):
        rows = pieces[i] if i < len(pieces) else _smallest_group(minibatch.sequences)
        whole = len(rows) == len(minibatch)  # as it is: scores of these very sequences may be there already
        part = minibatch if whole else minibatch.select(rows)
        yield Batch(part, totals, backend.device), float(i < len(pieces)), i == count - 1


def check_loss(loss: Any, algo: str, step: int) -> None:
    """
    Raises:
        RunError: what an algorithm returned as its loss can't be learnt from; says why.
    """
    if not isinstance(loss, Tensor):
        raise RunError(f"{algo} returned a loss of type {type(loss).__name__}, not a tensor")
    if loss.ndim:
        raise RunError(f"{algo} returned a loss of shape {tuple(loss.shape)}, not a scalar")
    if not math.isfinite(float(loss.detach())):
        raise RunError(f"the loss is {float(loss.detach())} in step {step}; nothing of it was applied")
    if not loss.requires_grad:
        raise RunError(f"the loss of {algo} has no gradient: it depends on no score of a trained role")


def _filled(minibatch: Experience, pieces: list[Tensor], world: World) -> tuple[Experience, list[Tensor]]:
    """What a rank without rows repeats: a group that another one lends."""
    have = [bool(n) for n in world.gather(len(pieces))]
    if all(have) or not any(have):
        return minibatch, pieces
    lender = have.index(True)
    lent = minibatch.select(_smallest_group(minibatch.sequences)) if world.rank == lender else None
    borrowed = world.broadcast(None if lent is None else lent.to_state(), lender)
    return (minibatch, pieces) if pieces else (Experience.from_state(borrowed), [])


def _smallest_group(sequences: Sequences) -> Tensor:
    """Rows of the group with the fewest tokens, int64."""
    lengths = torch.tensor(sequences.total_lengths())
    groups, of = torch.unique(sequences.group, return_inverse=True)
    tokens = torch.zeros(len(groups), dtype=torch.long).index_add(0, of, lengths)
    return torch.eq(of, int(tokens.argmin())).nonzero().flatten()


def add_up(sums: dict[str, Tensor], world: World) -> dict[str, float]:
    """Parts of means, float64 scalars by name, added up over ranks; a rank may have what another hasn't."""
    names: list[str] = sorted(set[str]().union(*world.gather(list(sums))))
    nothing = torch.zeros((), dtype=torch.float64)
    if not names:
        return {}
    found: list[Any] = world.sum(torch.stack([sums.get(name, nothing).double().cpu() for name in names])).tolist()
    return dict(zip(names, found, strict=True))
