"""What the backends that shard have in common: blocks, forwards that libraries can hook, tensors that are saved in
pieces and read in others."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from rlhf.api import Piece, RunError, ScoreRequest, Scores, Spread, TrainedParameter


class Visible(nn.Module):
    """A container whose outputs are plain tensors in lists and dicts, which libraries find and hang their backward
    hooks on. Tensors of their own: a hook on a view is lost when the view is written to."""

    def __init__(self, container: nn.Module) -> None:
        super().__init__()
        self.container = container

    def forward(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Any]]:
        outputs = (attrs.asdict(scores, recurse=False) for scores in self.container(requests))
        return [{k: v.clone() if isinstance(v, Tensor) else v for k, v in output.items()} for output in outputs]


def scores_of(outputs: Sequence[dict[str, Any]]) -> list[Scores]:
    """The inverse of what `Visible` does."""
    return [Scores(**output) for output in outputs]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """A transformer's layers: the modules of which transformers says that they must not be split."""
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def something_to_train(parameters: Sequence[TrainedParameter]) -> None:
    """
    Raises:
        RunError: there is nothing.
    """
    if not parameters:
        raise RunError("nothing is to be trained: every parameter of every trainable role is frozen")


@contextlib.contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Forwards of the module and its parts without hooks: nothing is gathered or released. It must be whole."""
    parts = list(module.modules())
    kept = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, kept, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after


def process_group(device: str) -> None:
    """The default process group of a run of one rank: the libraries want one even so."""
    if not torch.distributed.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def piece_of(flat: Tensor, shape: Sequence[int], start: int) -> Piece:
    """A rank's part of a tensor without the padding at the whole's end.

    Args:
        flat: [n], elements from `start` on; those beyond the whole are padding.
        shape: of the whole.
    """
    size = max(0, min(flat.numel(), math.prod(shape) - start))
    return Piece(flat.detach().reshape(-1)[:size], tuple(shape), start)


def fill(flat: Tensor, saved: Tensor | Spread, start: int) -> None:
    """Take a rank's part of a saved tensor, whole or in pieces; what lies beyond its end stays. flat: [n]."""
    size = max(0, min(flat.numel(), math.prod(saved.shape) - start))
    if size:
        part = saved.read(start, start + size) if isinstance(saved, Spread) else saved.reshape(-1)[start : start + size]
        flat.detach()[:size].copy_(part)
