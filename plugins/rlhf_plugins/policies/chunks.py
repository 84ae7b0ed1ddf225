"""Heads of a vocabulary's size are read some positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(read: Callable[..., Tensor], chunk: int, states: Tensor, *beside: Tensor) -> list[Tensor]:
    """What `read` makes of at most `chunk` positions at a time, in the backward too, where it is computed again.

    Args:
        read: of some states and what stands beside them; nothing random inside.
        states: [N, D]. beside: [N, ...] each.
    """
    found: list[Tensor] = []
    for i in range(0, len(states), chunk):
        piece = [x[i : i + chunk] for x in (states, *beside)]
        if torch.is_grad_enabled():  # nothing random inside, so no RNG to keep
            found.append(cast(Tensor, checkpoint(read, *piece, use_reentrant=False, preserve_rng_state=False)))
        else:
            found.append(read(*piece))
    return found
