"""Memory strategies, each with one error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rlhf.api import LoadSpec, MemoryStrategy, TrainedParameter


class Plain(MemoryStrategy):
    """Nothing at all."""


class Shrinking(Plain):
    """Loses a little of every weight."""

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter *= 0.99
        return module


class Drifting(Plain):
    """Changes what isn't trained."""

    kept: Any = None

    def adapt(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        if not spec.trainable:
            Drifting.kept = next(module.parameters())
        return module

    def stepped(self) -> None:
        with torch.no_grad():
            if Drifting.kept is not None:
                Drifting.kept *= 1.001


class Other(Plain):
    """Saves other weights than those that were trained, half of each."""

    parameters: Sequence[TrainedParameter] = ()

    def settled(self, parameters: Sequence[TrainedParameter]) -> None:
        self.parameters = parameters

    def stand_in(self, purpose: Any) -> contextlib.AbstractContextManager[Any] | None:
        self.saves += purpose == "save"
        return self._halved() if purpose == "save" and self.saves == 1 else None

    saves = 0

    @contextlib.contextmanager
    def _halved(self) -> Iterator[None]:
        with torch.no_grad():
            for one in self.parameters:
                one.parameter.mul_(0.5)
        yield
        with torch.no_grad():
            for one in self.parameters:
                one.parameter.mul_(2.0)


class Forgetful(Plain):
    """A moving average that no checkpoint holds."""

    def settled(self, parameters: Sequence[TrainedParameter]) -> None:
        self.parameters = parameters
        self.average = [one.parameter.detach().clone() for one in parameters]

    def stepped(self) -> None:
        for average, one in zip(self.average, self.parameters, strict=True):
            average.lerp_(one.parameter.detach(), 0.1)

    def stand_in(self, purpose: Any) -> contextlib.AbstractContextManager[Any] | None:
        return self._swapped()

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        own = [one.parameter.detach().clone() for one in self.parameters]
        self._put(self.average)
        yield
        self._put(own)

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for one, value in zip(self.parameters, values, strict=True):
                one.parameter.copy_(value)


class Slowing(Plain):
    """Wraps a module, and halves its gradients."""

    def wrap(self, module: nn.Module, spec: LoadSpec) -> nn.Module:
        if spec.trainable:
            next(module.parameters()).register_hook(lambda gradient: gradient * 0.5)
        return module
