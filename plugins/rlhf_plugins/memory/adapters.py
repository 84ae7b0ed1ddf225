"""Which of several adapters on one base are on. Said for a forward and taken back after it.

PEFT's own `set_adapter` and `disable_adapter` also change what is trained: a forward under one adapter, then
`set_adapter` of another, then the backward gives the first no gradient, and no error. Here nothing but the choice is
changed, so a backward finds its graph as it was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

Choice = list[tuple[Any, bool, Any]]
"""(layer, whether its adapters are off, those that are on else) of each layer with adapters."""


def chosen(module: nn.Module) -> Choice:
    """What is on in a module now."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(p, p._disable_adapters, p._active_adapter) for p in module.modules() if isinstance(p, kinds)]


@contextlib.contextmanager
def active(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A context in which these adapters of a module are on and no others; none: it is its own base."""
    before = chosen(module)
    _choose((part, not names, list(names) if names else on) for part, _, on in before)
    try:
        yield
    finally:
        _choose(before)


@contextlib.contextmanager
def again(choice: Choice) -> Iterator[None]:
    """A context in which the choice is what it was: for a forward that is computed a second time, in a backward."""
    before = [(part, part._disable_adapters, part._active_adapter) for part, _, _ in choice]
    _choose(choice)
    try:
        yield
    finally:
        _choose(before)


def _choose(choice: Iterable[tuple[Any, bool, Any]]) -> None:
    for part, off, on in choice:
        part._disable_adapters, part._active_adapter = off, on
